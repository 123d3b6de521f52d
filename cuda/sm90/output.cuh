// How the matmul kernels finish their sums and write y.
//
// The accumulator of a warpgroup has a row for each of 64 features and a column for each token, y is the other way
// round: the warpgroup brings 32 tokens at a time, a piece, through shared memory, from where a tensor copy stores it,
// or two, one for each panel of 32 features, which need not be neighbours in y. There is room for several pieces, so
// that filling one overlaps storing those before. The epilogue works on the sums while they are in registers, where a
// lane has two features and so two biases. The slope goes the way of y. The scale has come into the ring by tensor
// copies as chunks of x do, in stages of its own after the last step of the tile, one for each warpgroup, and is read
// transposed, as y is written: so it arrives while products run. What bounds it: memory, if the products leave it time:
// it reads or writes y's size twice for one of y.
#pragma once

#include <cstdint>

#include "../activation.cuh"
#include "matmul_common.cuh"

namespace jax_blocksparse::sm90 {

// A team of kWarpgroups writes a tile, kStored features together. Without kFuses there must be no epilogue; then none
// of its code takes registers from the products.
template <typename T, int kTokens, int kWarpgroups, int kStored, bool kFuses>
class OutputWriter {
 public:
  // For pieces in shared memory, for each warpgroup. Where there are four of them, one works while another one waits.
  static constexpr int kRooms = kTokens < 256 ? 2 : 4;
  static constexpr int kStoredWarps = kStored / 16;  // that have the features stored together
  static constexpr bool kIsTight = kTokens == 128;   // four warpgroups leave few registers
  static constexpr int kSharedBytes = kWarpgroups * kRooms * kPieceBytes;
  static_assert(kTokens % kPieceTokens == 0 && kTokens % kSumTokens == 0);
  static_assert(kStored == kPanel || kStored == kGroup, "what a swizzle is over, in 16-bit elements");
  static_assert(kSumTokens % kPieceTokens == 0, "a piece completes column sums");
  static_assert(kPieceTokens * kGroup * 2 == kPieceBytes && kRooms >= 2, "two rooms are enough for a piece of floats");
  static_assert(kTokens / kPieceTokens % kRooms == 0, "the next tile begins with the first room again");

  // `warpgroup` counts through those of all teams; each has a named barrier, from 1 on.
  __device__ OutputWriter(const KernelParams& p, std::uint32_t shared, int warpgroup)
      : p_(p), rooms_(shared + warpgroup * kRooms * kPieceBytes), warpgroup_(warpgroup) {}

  // The biases of the lane's features in a tile: for Write, but asked for before the last products are waited for.
  __device__ float2 LoadBiases(const Tile& tile) const {
    if (!kFuses || p_.epilogue.bias == nullptr) return {0.f, 0.f};
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
    if constexpr (std::is_same_v<T, float>) {
      WriteFloats(sum, tile, token);
    } else if constexpr (kFuses) {
      WriteWithEpilogue(sum, biases, tile, token, ring, stages, stage_bytes, release);
    } else {
      p_.f32_output ? WriteFloats(sum, tile, token) : WriteHalves(sum, tile, token);
    }
  }

  __device__ void Finish() const {
    if (IsStorer()) WaitForStores();
  }

 private:
  template <typename Release>
  __device__ void WriteWithEpilogue(const float (&sum)[kTokens / 2], float2 biases, const Tile& tile, int token,
                                    Ring& ring, std::uint32_t stages, int stage_bytes, const Release& release) {
    const bool is_scaled = p_.epilogue.scale != nullptr;
#pragma unroll 1
    for (int i = 0; i < kWarpgroups; ++i) {
      if (is_scaled) ring.WaitFull();
      if (i == warpgroup_ % kWarpgroups) {
        const std::uint32_t scale = stages + ring.stage() * stage_bytes;
        WithActivation(p_.epilogue.activation, [&](auto activation) {
          FinishAndWrite<decltype(activation)::value>(sum, biases, tile, token, scale);
        });
      }
      if (!is_scaled) continue;
      __syncwarp();
      release(ring.empty());
      ring.Advance();
    }
  }

  __device__ bool IsStorer() const { return threadIdx.x % 128 == 0; }
  // Of the lane's two features the first; the other one is 8 further.
  __device__ int FeatureOf(const Tile& tile) const {
    const int warp = threadIdx.x % 128 / 32;
    return Tile::FeatureOf(tile.own, warp / kStoredWarps) + warp % kStoredWarps * 16 +
           static_cast<int>(threadIdx.x % 32 / 4);
  }
  // Where a lane's row of the matrices lies that are its warp's 16 features x 16 tokens, from `token` on, in a piece or
  // a scale of kRows tokens.
  template <int kRows>
  __device__ std::uint32_t MatrixRow(int token) const {
    const int row = token + (thread_ & 7) + (thread_ >> 4 & 1) * 8;
    return thread_ / 32 / kStoredWarps * (kRows * kStored * 2) +
           Swizzled<kStored * 2>(row, thread_ / 32 % kStoredWarps * 2 + (thread_ >> 3 & 1));
  }

  __device__ void WriteHalves(const float (&sum)[kTokens / 2], const Tile& tile, int token) {
#pragma unroll
    for (int first = 0; first < kTokens; first += kPieceTokens) {
      std::uint32_t packed[kPieceTokens / 4];
      const int room = first / kPieceTokens % kRooms;
      PackAll(sum + first / 2, packed);
      Stage(packed, room, 0);
      CompleteStaged<kRooms - 2>();
      if (IsStorer()) Store(&p_.y, tile, token + first, room);
    }
  }

  // A loop that is not unrolled cannot index registers, only choose from them, which costs an instruction for each sum
  // and each turn. Unrolled, costly activations would outgrow the instruction cache, and four warpgroups have no
  // registers for it. There is a loop for each activation: a switch inside costs up to 45 us in 750.
  template <Activation kActivation>
  __device__ void FinishAndWrite(const float (&sum)[kTokens / 2], float2 biases, const Tile& tile, int token,
                                 std::uint32_t scale) {
    constexpr int kPart = kIsTight ? kPieceTokens / 2 : kPieceTokens;  // tokens; more want more registers
    constexpr bool kIsCheap = kActivation == Activation::kNone || kActivation == Activation::kRelu;
    constexpr int kTurnTokens = kIsCheap && !kIsTight ? kTokens : kSumTokens;
    const Epilogue& epilogue = p_.epilogue;
    const bool has_slope = epilogue.slope != nullptr;
    float2 column_sums = {0.f, 0.f};
    int room = 0;
#pragma unroll 1
    for (int turn = 0; turn < kTokens / kTurnTokens; ++turn) {
#pragma unroll
      for (int inside = 0; inside < kTurnTokens; inside += kPieceTokens) {
        const int first = turn * kTurnTokens + inside;
        if (kRooms == 2 && has_slope) {
          if (IsStorer()) WaitForStoreReads<0>();
          SyncWarpgroup(warpgroup_ + 1);
        }
#pragma unroll
        for (int part = 0; part < kPieceTokens; part += kPart) {
          float values[kPart / 2];
          std::uint32_t packed[kPart / 4], slopes[kPart / 4];
#pragma unroll
          for (int i = 0; i < kTokens / kTurnTokens; ++i) {
            if (i != turn) continue;
            const float* from = sum + (i * kTurnTokens + inside + part) / 2;
#pragma unroll
            for (int j = 0; j < kPart / 2; ++j) values[j] = Opaque(from[j]);
          }
          Apply<kActivation>(values, slopes, biases);
          if (epilogue.scale != nullptr) Scale(values, scale, first + part);
          if (epilogue.column_sums != nullptr) AddTo(column_sums, values);
          PackAll(values, packed);
          Stage(packed, room, part);
          if (has_slope) Stage(slopes, room + 1, part);
        }
        CompleteStaged<0>();
        if (IsStorer()) Store(&p_.y, tile, token + first, room);
        if (has_slope && IsStorer()) Store(&p_.slope, tile, token + first, room + 1);
        room = (room + 1 + has_slope) % kRooms;
        if (epilogue.column_sums != nullptr && (inside + kPieceTokens) % kSumTokens == 0) {
          StoreColumnSums(column_sums, tile, token + first + kPieceTokens - kSumTokens);
          column_sums = {0.f, 0.f};
        }
      }
    }
  }

  // Two values at a time, of neighbouring tokens, belong to the same of the lane's features.
  template <Activation kActivation, int kValues>
  __device__ static void Apply(float (&values)[kValues], std::uint32_t (&slopes)[kValues / 2], float2 biases) {
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      const float bias = i % 4 == 0 ? biases.x : biases.y;
      const ValueAndSlope even = Activate<kActivation>(values[i] + bias),
                          odd = Activate<kActivation>(values[i + 1] + bias);
      values[i] = even.value;
      values[i + 1] = odd.value;
      slopes[i / 2] = Pack<T>(even.slope, odd.slope);
    }
  }

  // By the tokens of `scale` that follow `first`.
  template <int kValues>
  __device__ void Scale(float (&values)[kValues], std::uint32_t scale, int first) const {
#pragma unroll
    for (int i = 0; i < kValues; i += 8) {
      std::uint32_t scales[4];
      LoadMatrices<true>(scales, scale + MatrixRow<kTokens>(first + i * 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = Unpack<T>(scales[j]);
        values[i + j * 2] *= pair.x;
        values[i + j * 2 + 1] *= pair.y;
      }
    }
  }

  template <int kValues>
  __device__ static void AddTo(float2& sums, const float (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      sums.x += values[i] + values[i + 1];
      sums.y += values[i + 2] + values[i + 3];
    }
  }

  template <int kWords>
  __device__ static void PackAll(const float* values, std::uint32_t (&packed)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) packed[i] = Pack<T>(values[i * 2], values[i * 2 + 1]);
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

  // Puts tokens of a piece, from `token` on, where they belong.
  template <int kWords>
  __device__ void Stage(const std::uint32_t (&packed)[kWords], int room, int token) const {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      StoreMatricesTransposed(rooms_ + room * kPieceBytes + MatrixRow<kPieceTokens>(token + i * 4), packed[i],
                              packed[i + 1], packed[i + 2], packed[i + 3]);
    }
  }

  // Waits until what all threads have staged can be stored and all but the last kPending stores have left their rooms.
  template <int kPending>
  __device__ void CompleteStaged() const {
    FenceForCopies();
    if (IsStorer()) WaitForStoreReads<kPending>();
    SyncWarpgroup(warpgroup_ + 1);
  }

  __device__ void Store(const CUtensorMap* to, const Tile& tile, int token, int room) const {
#pragma unroll
    for (int i = 0; i < kGroup / kStored; ++i) {
      StoreTensor(to, Tile::FeatureOf(tile.own, i), token, tile.batch,
                  rooms_ + room * kPieceBytes + i * kPieceTokens * kStored * 2);
    }
    CommitStores();
  }

  // As floats, a piece is two boxes of 32 features, which take the room of two.
  __device__ void WriteFloats(const float (&sum)[kTokens / 2], const Tile& tile, int token) const {
    const int row = thread_ / 32 % 2 * 16 + thread_ % 32 / 4;
    const std::uint32_t box = rooms_ + thread_ / 64 * kPieceBytes + row % 4 * 4;
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
        StoreTensor(&p_.y, Tile::FeatureOf(tile.own, 0), token + first, tile.batch, rooms_);
        StoreTensor(&p_.y, Tile::FeatureOf(tile.own, 1), token + first, tile.batch, rooms_ + kPieceBytes);
        CommitStores();
      }
    }
  }

  const KernelParams& p_;
  std::uint32_t rooms_;
  int warpgroup_;
  int thread_;  // of the warpgroup; set for each tile anew, so that it takes no register from the products
};

}  // namespace jax_blocksparse::sm90
