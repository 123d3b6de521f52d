// How the matmul kernels write y.
#pragma once

#include <cstdint>

#include "epilogue.cuh"
#include "matmul_common.cuh"

namespace jax_blocksparse::sm90 {

// Writes the 64 features x kTokens tokens that a warpgroup has in `sum`, through its piece of shared memory.
// The accumulator is transposed on the way: it has a row for each feature, y one for each token.
template <typename T, int kTokens>
class OutputWriter {
 public:
  __device__ OutputWriter(const KernelParams& p, std::uint32_t buffer, int warpgroup)
      : p_(p), buffer_(buffer), sync_(warpgroup + 1), warp_(threadIdx.x / 32 % 4), lane_(threadIdx.x % 32) {}

  __device__ void Write(const float (&sum)[kTokens / 2], int feature, int token, int batch) {
    if (!p_.epilogue.IsIdentity()) {
      FinishAndWrite(sum, feature, token, batch);
    } else if (p_.f32_output) {
      WritePieces<32>(sum, feature, token, batch);
    } else {
      WritePieces<64>(sum, feature, token, batch);
    }
  }

  __device__ void Finish() const {
    if (IsStorer()) WaitForStores();
  }

 private:
  __device__ bool IsStorer() const { return threadIdx.x % 128 == 0; }

  // kPieceTokens is 64 for 16-bit values and 32 for float, where a piece is two boxes of 32 features.
  template <int kPieceTokens>
  __device__ void WritePieces(const float (&sum)[kTokens / 2], int feature, int token, int batch) {
#pragma unroll
    for (int piece = 0; piece < kTokens / kPieceTokens; ++piece) {
      if (IsStorer()) WaitForStoreReads<0>();
      SyncWarpgroup(sync_);
      const float* part = sum + piece * (kPieceTokens / 2);
      if constexpr (kPieceTokens == 64) {
        StageHalves(part);
      } else {
        StageFloats(part);
      }
      FenceForCopies();
      SyncWarpgroup(sync_);
      if (IsStorer()) {
        const int first = token + piece * kPieceTokens;
        StoreTensor(&p_.y, feature, first, batch, buffer_);
        if constexpr (kPieceTokens == 32) {
          StoreTensor(&p_.y, feature + 32, first, batch, buffer_ + kPieceBytes / 2);
        }
        CommitStores();
      }
    }
  }

  // Brings the sums into the order of y, through shared memory and piece by piece, finishes them there and stores them.
  __device__ void FinishAndWrite(const float (&sum)[kTokens / 2], int feature, int token, int batch) const {
    constexpr int kPieceTokens = 32, kFours = kGroup / 4;
#pragma unroll 1
    for (int piece = 0; piece < kTokens / kPieceTokens; ++piece) {
      SyncWarpgroup(sync_);
#pragma unroll
      for (int i = 0; i < kTokens / kPieceTokens; ++i) {
        if (i == piece) StageFloats(sum + i * (kPieceTokens / 2));
      }
      SyncWarpgroup(sync_);
#pragma unroll 1
      for (int i = threadIdx.x % 128; i < kPieceTokens * kFours; i += 128) {
        const int row = i / kFours, four = i % kFours;
        const int t = token + piece * kPieceTokens + row, f = feature + four * 4;
        if (t >= p_.tokens || f >= p_.out_features) continue;
        float values[4];
        LoadShared16(buffer_ + four / 8 * (kPieceBytes / 2) + Swizzled(row, four % 8), values);
        const std::int64_t row_elements = p_.out_features, batch_elements = p_.tokens * row_elements;
        FinishFour<T>(p_.epilogue, p_.y_array, p_.f32_output, batch_elements, batch, t * row_elements + f, f, values);
      }
    }
  }

  __device__ void StageHalves(const float* sum) const {
    const int row = (lane_ & 7) + (lane_ >> 4 & 1) * 8, piece = warp_ * 2 + (lane_ >> 3 & 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* s = sum + i * 8;
      StoreMatricesTransposed(buffer_ + Swizzled(i * 16 + row, piece), Pack<T>(s[0], s[1]), Pack<T>(s[2], s[3]),
                              Pack<T>(s[4], s[5]), Pack<T>(s[6], s[7]));
    }
  }

  __device__ void StageFloats(const float* sum) const {
    const int feature = (warp_ & 1) * 16 + lane_ / 4;
    const std::uint32_t buffer = buffer_ + (warp_ >> 1) * (kPieceBytes / 2) + feature % 4 * 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int token = i / 4 * 8 + lane_ % 4 * 2 + (i & 1);
      StoreShared4(buffer + Swizzled(token, feature / 4 + (i & 2)), __float_as_uint(sum[i]));
    }
  }

  const KernelParams& p_;
  std::uint32_t buffer_;
  int sync_;
  int warp_, lane_;
};

}  // namespace jax_blocksparse::sm90
