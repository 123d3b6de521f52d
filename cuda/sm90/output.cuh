// How the matmul kernels finish their sums and write y.
//
// The accumulator of a warpgroup has a row for each of 64 features and a column for each token, y is the other way
// round: the warpgroup brings 32 tokens at a time, a piece, through shared memory, from where a tensor copy stores it.
// There is room for several pieces, so that filling one overlaps storing those before. The epilogue works on the sums
// while they are in registers, where a lane has two features and so two biases. The slope goes the way of y. The scale
// has come into the ring by tensor copies as chunks of x do, in stages of its own after the last step of the tile, one
// for each warpgroup, and is read transposed, as y is written: so it arrives while products run.
// What bounds it: memory, if the products leave it time: it reads or writes y's size twice for one of y.
#pragma once

#include <cstdint>

#include "../activation.cuh"
#include "matmul_common.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kTokens, int kWarpgroups>
class OutputWriter {
 public:
  // In shared memory, for each warpgroup. Where there are four of them, one works while another one waits for its
  // stores.
  static constexpr int kPieces = kWarpgroups > 2 || kTokens == 64 ? 2 : 4;
  static constexpr int kSharedBytes = kWarpgroups * kPieces * kPieceBytes;
  static_assert(kTokens % kPieceTokens == 0 && kTokens % kSumTokens == 0);
  static_assert(kPieceTokens * 2 == kSumTokens, "every other piece completes column sums");
  static_assert(kPieceTokens * kGroup * 2 == kPieceBytes && kPieces >= 2, "two pieces have room for one of floats");
  static_assert(kTokens / kPieceTokens % kPieces == 0, "the next tile begins with the first piece again");

  __device__ OutputWriter(const KernelParams& p, std::uint32_t shared, int warpgroup)
      : p_(p), pieces_(shared + warpgroup * kPieces * kPieceBytes), warpgroup_(warpgroup) {}

  // The biases of the lane's features in a tile: for Write, but asked for before the last products are waited for.
  __device__ float2 LoadBiases(const Tile& tile) const {
    if (p_.epilogue.bias == nullptr) return {0.f, 0.f};
    const float* bias = p_.epilogue.bias + tile.batch * p_.epilogue.bias_batch_stride;
    const int feature = FeatureOf(tile);
    return {feature < p_.out_features ? __ldg(bias + feature) : 0.f,
            feature + 8 < p_.out_features ? __ldg(bias + feature + 8) : 0.f};
  }

  // Writes the warpgroup's share of a tile whose first token is `token`. The ring's next stages are the scale's, if
  // there is one; release(barrier) hands a stage back for the calling warp.
  template <typename Release>
  __device__ void Write(const float (&sum)[kTokens / 2], float2 biases, const Tile& tile, int token, Ring& ring,
                        std::uint32_t stages, int stage_bytes, const Release& release) {
    thread_ = Opaque(threadIdx.x % 128);
    piece_ = 0;
    if (p_.epilogue.IsIdentity()) {
      p_.f32_output ? WriteFloats(sum, tile, token) : WriteHalves(sum, tile, token);
      return;
    }
    const bool is_scaled = p_.epilogue.scale != nullptr;
#pragma unroll 1
    for (int i = is_scaled ? 0 : warpgroup_; i < (is_scaled ? kWarpgroups : warpgroup_ + 1); ++i) {
      if (is_scaled) ring.WaitFull();
      if (i == warpgroup_) FinishAndWrite(sum, biases, tile, token, stages + ring.stage() * stage_bytes);
      if (!is_scaled) break;
      __syncwarp();
      release(ring.empty());
      ring.Advance();
    }
  }

  __device__ void Finish() const {
    if (IsStorer()) WaitForStores();
  }

 private:
  using Part = float[8];            // what a lane has of its warp's 16 features x 16 tokens
  using Packed = std::uint32_t[4];  // the same in 16 bits, pairs of tokens

  __device__ bool IsStorer() const { return threadIdx.x % 128 == 0; }
  __device__ std::uint32_t Piece() const { return pieces_ + piece_ * kPieceBytes; }
  // Of the lane's two features the first; the other one is 8 further.
  __device__ int FeatureOf(const Tile& tile) const {
    return tile.feature + static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4);
  }
  // Where a lane's row of the matrices lies that are its warp's 16 features x 16 tokens, from `token` on.
  __device__ std::uint32_t MatrixRow(int token) const {
    return Swizzled(token + (thread_ & 7) + (thread_ >> 4 & 1) * 8, thread_ / 32 * 2 + (thread_ >> 3 & 1));
  }

  __device__ void WriteHalves(const float (&sum)[kTokens / 2], const Tile& tile, int token) {
#pragma unroll
    for (int first = 0; first < kTokens; first += kPieceTokens) {
#pragma unroll
      for (int i = 0; i < kPieceTokens; i += 16) {
        Packed packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = Pack<T>(sum[(first + i) / 2 + j * 2], sum[(first + i) / 2 + j * 2 + 1]);
        Stage(i, packed);
      }
      StoreStaged(&p_.y, tile, token + first);
    }
  }

  // The sums of a piece are copied, because registers cannot be indexed by a loop that is not unrolled; unrolled it
  // would outgrow the instruction cache.
  __device__ void FinishAndWrite(const float (&sum)[kTokens / 2], float2 biases, const Tile& tile, int token,
                                 std::uint32_t scale) {
    const Epilogue& epilogue = p_.epilogue;
    float2 column_sums = {0.f, 0.f};
#pragma unroll 1
    for (int first = 0; first < kTokens; first += kPieceTokens) {
      Packed slopes[kPieceTokens / 16];
#pragma unroll
      for (int i = 0; i < kPieceTokens / 16; ++i) {
        Part values;
#pragma unroll
        for (int j = 0; j < kTokens; j += kPieceTokens) {
          if (j != first) continue;
#pragma unroll
          for (int k = 0; k < 8; ++k) values[k] = Opaque(sum[j / 2 + i * 8 + k]);
        }
        Activate(values, slopes[i], biases);
        if (epilogue.scale != nullptr) Scale(values, scale + MatrixRow(first + i * 16));
        if (epilogue.column_sums != nullptr) AddTo(column_sums, values);
        Packed packed;
#pragma unroll
        for (int j = 0; j < 4; ++j) packed[j] = Pack<T>(values[j * 2], values[j * 2 + 1]);
        Stage(i * 16, packed);
      }
      StoreStaged(&p_.y, tile, token + first);
      if (epilogue.slope != nullptr) {
#pragma unroll
        for (int i = 0; i < kPieceTokens / 16; ++i) Stage(i * 16, slopes[i]);
        StoreStaged(&p_.slope, tile, token + first);
      }
      if (epilogue.column_sums != nullptr && first % kSumTokens != 0) {
        StoreColumnSums(column_sums, tile, token + first - kPieceTokens);
        column_sums = {0.f, 0.f};
      }
    }
  }

  // Of a part's values, two at a time belong to the same feature, the two features taking turns.
  __device__ void Activate(Part& values, Packed& slopes, float2 biases) const {
    WithActivation(p_.epilogue.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float bias = i % 4 == 0 ? biases.x : biases.y;
        const auto even = jax_blocksparse::Activate<decltype(activation)::value>(values[i] + bias);
        const auto odd = jax_blocksparse::Activate<decltype(activation)::value>(values[i + 1] + bias);
        values[i] = even.value;
        values[i + 1] = odd.value;
        slopes[i / 2] = Pack<T>(even.slope, odd.slope);
      }
    });
  }

  __device__ static void Scale(Part& values, std::uint32_t matrix_row) {
    Packed scales;
    LoadMatrices<true>(scales, matrix_row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Unpack<T>(scales[i]);
      values[i * 2] *= pair.x;
      values[i * 2 + 1] *= pair.y;
    }
  }

  __device__ static void AddTo(float2& sums, const Part& values) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      sums.x += values[i] + values[i + 1];
      sums.y += values[i + 2] + values[i + 3];
    }
  }

  // Adds up what the four lanes of the same features have.
  __device__ void StoreColumnSums(float2 sums, const Tile& tile, int token) const {
#pragma unroll
    for (int i = 1; i < 4; i *= 2) {
      sums.x += __shfl_xor_sync(kAllLanes, sums.x, i);
      sums.y += __shfl_xor_sync(kAllLanes, sums.y, i);
    }
    const int feature = FeatureOf(tile);
    if (thread_ % 4 != 0 || token >= p_.tokens) return;
    const std::int64_t rows = (p_.tokens + kSumTokens - 1) / kSumTokens;
    float* to = p_.epilogue.column_sums + (tile.batch * rows + token / kSumTokens) * p_.out_features;
    if (feature < p_.out_features) to[feature] = sums.x;
    if (feature + 8 < p_.out_features) to[feature + 8] = sums.y;
  }

  // Puts 16 tokens of a piece where they belong in it.
  __device__ void Stage(int token, const Packed& packed) const {
    StoreMatricesTransposed(Piece() + MatrixRow(token), packed[0], packed[1], packed[2], packed[3]);
  }

  // Stores a piece of an array like y. The one barrier says that the piece is complete and that the next one's room is
  // free again.
  __device__ void StoreStaged(const CUtensorMap* to, const Tile& tile, int token) {
    FenceForCopies();
    if (IsStorer()) WaitForStoreReads<kPieces - 2>();
    SyncWarpgroup(warpgroup_ + 1);
    if (IsStorer()) {
      StoreTensor(to, tile.feature + warpgroup_ * kGroup, token, tile.batch, Piece());
      CommitStores();
    }
    piece_ = (piece_ + 1) % kPieces;
  }

  // As floats, a piece is two boxes of 32 features, which take the room of two.
  __device__ void WriteFloats(const float (&sum)[kTokens / 2], const Tile& tile, int token) const {
    const int row = thread_ / 32 % 2 * 16 + thread_ % 32 / 4;
    const std::uint32_t box = pieces_ + thread_ / 64 * kPieceBytes + row % 4 * 4;
#pragma unroll
    for (int first = 0; first < kTokens; first += kPieceTokens) {
      if (IsStorer()) WaitForStoreReads<0>();
      SyncWarpgroup(warpgroup_ + 1);
#pragma unroll
      for (int i = 0; i < kPieceTokens / 2; ++i) {
        const int column = i / 4 * 8 + thread_ % 4 * 2 + i % 2;
        StoreShared4(box + Swizzled(column, row / 4 + (i & 2)), __float_as_uint(sum[first / 2 + i]));
      }
      FenceForCopies();
      SyncWarpgroup(warpgroup_ + 1);
      if (IsStorer()) {
        const int feature = tile.feature + warpgroup_ * kGroup;
        StoreTensor(&p_.y, feature, token + first, tile.batch, pieces_);
        StoreTensor(&p_.y, feature + 32, token + first, tile.batch, pieces_ + kPieceBytes);
        CommitStores();
      }
    }
  }

  const KernelParams& p_;
  std::uint32_t pieces_;
  int warpgroup_;
  // Set for each tile anew, so that they take no registers from the products.
  int thread_;  // of the warpgroup
  int piece_;   // the next to be filled
};

}  // namespace jax_blocksparse::sm90
