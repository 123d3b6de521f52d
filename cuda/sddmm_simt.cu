// The blocks of x^T dy by plain FMA, for float32 in any block size and for 16-bit elements in blocks of 8.
//
// A CTA computes one block (a quarter of it for blocks of 128) over all tokens, some tokens at a time: the next slice
// of x and dy travels from global memory into registers while the present one is multiplied from shared memory. Each
// thread has a tile of 4x4 sums (8x4 for the largest); where that takes fewer than all threads, the others take
// different tokens, and the sums are added at the end in a fixed order. What bounds it: reads from L2 for small blocks,
// FMA throughput for large ones.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "simt_tile.cuh"

namespace jax_blocksparse {
namespace {

template <int kSideLength>
struct SimtSddmmTile {
  static constexpr int kSide = kSideLength;  // the block size, or 64 for blocks of 128
  static constexpr int kTokens = kSide <= 16 ? 64 : 32;
  static constexpr int kThreadRows = kSide == 64 ? 8 : 4;
  static constexpr int kThreadCols = 4;
  static constexpr int kRowThreads = kSide / kThreadRows;
  static constexpr int kColThreads = kSide / kThreadCols;
  static constexpr int kSplit = kSimtThreads / (kRowThreads * kColThreads);
  static constexpr int kQuads = kTokens * kSide / kQuad / kSimtThreads;  // of each operand that a thread moves a slice
  static constexpr int kSliceFloats = kTokens * kSide;
  static constexpr int kPartialFloats = kSplit * kSide * kSide;
  static_assert(kRowThreads * kColThreads * kSplit == kSimtThreads && kTokens % kSplit == 0);
  static_assert(kTokens * kSide % (kQuad * kSimtThreads) == 0);
};

template <typename T, int kSideLength>
__global__ void __launch_bounds__(kSimtThreads) SddmmSimtKernel(const __grid_constant__ SddmmParams p) {
  using Tile = SimtSddmmTile<kSideLength>;
  constexpr int kSide = Tile::kSide;
  __shared__ __align__(16) float shared[std::max(2 * Tile::kSliceFloats, Tile::kPartialFloats)];
  float* const x_slice = shared;
  float* const dy_slice = shared + Tile::kSliceFloats;

  const int pieces_a_side = p.block / kSide;
  const int pieces = pieces_a_side * pieces_a_side;
  const int piece = static_cast<int>(blockIdx.x % pieces);
  const std::int64_t batch = blockIdx.x / pieces / p.nnz;
  const std::int64_t id = blockIdx.x / pieces % p.nnz;
  const int piece_row = piece / pieces_a_side * kSide, piece_col = piece % pieces_a_side * kSide;

  const int row = p.rows[batch * p.ids_batch_stride + id], col = p.cols[batch * p.ids_batch_stride + id];
  const std::int64_t first_row = static_cast<std::int64_t>(row) * p.block,
                     first_col = static_cast<std::int64_t>(col) * p.block;
  const bool inert = row < 0 || col < 0 || first_row >= p.in_features || first_col >= p.out_features;
  const std::int64_t steps = inert ? 0 : CeilDiv(p.tokens, Tile::kTokens);
  // How much of this piece exists; may be negative.
  const std::int64_t x_features = inert ? 0 : p.in_features - first_row - piece_row;
  const std::int64_t dy_features = inert ? 0 : p.out_features - first_col - piece_col;
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const T* dy = static_cast<const T*>(p.dy) + batch * p.dy_batch_stride;
  const bool x_aligned = IsQuadAligned(x, p.in_features), dy_aligned = IsQuadAligned(dy, p.out_features);
  x += first_row + piece_row;
  dy += first_col + piece_col;

  const int thread = threadIdx.x;
  Quad<float> next_x[Tile::kQuads], next_dy[Tile::kQuads];
  const auto fetch = [&](std::int64_t step) {
#pragma unroll
    for (int i = 0; i < Tile::kQuads; ++i) {
      const int quad = thread + i * kSimtThreads;
      const std::int64_t token = step * Tile::kTokens + quad / (kSide / kQuad);
      const int feature = quad % (kSide / kQuad) * kQuad;
      const bool exists = token < p.tokens;
      next_x[i] = LoadQuad(x + token * p.in_features + feature, exists ? x_features - feature : 0, x_aligned);
      next_dy[i] = LoadQuad(dy + token * p.out_features + feature, exists ? dy_features - feature : 0, dy_aligned);
    }
  };

  const int split = thread / (Tile::kRowThreads * Tile::kColThreads);
  const int row_thread = thread / Tile::kColThreads % Tile::kRowThreads, col_thread = thread % Tile::kColThreads;
  float sums[Tile::kThreadRows][Tile::kThreadCols] = {};
  if (steps > 0) fetch(0);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < Tile::kQuads; ++i) {
      reinterpret_cast<Quad<float>*>(x_slice)[thread + i * kSimtThreads] = next_x[i];
      reinterpret_cast<Quad<float>*>(dy_slice)[thread + i * kSimtThreads] = next_dy[i];
    }
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1);
#pragma unroll 8
    for (int k = 0; k < Tile::kTokens / Tile::kSplit; ++k) {
      const int token = k * Tile::kSplit + split;
      float a[Tile::kThreadRows], b[Tile::kThreadCols];
      ReadTileRow(a, x_slice + token * kSide, row_thread, Tile::kRowThreads);
      ReadTileRow(b, dy_slice + token * kSide, col_thread, Tile::kColThreads);
#pragma unroll
      for (int m = 0; m < Tile::kThreadRows; ++m) {
#pragma unroll
        for (int n = 0; n < Tile::kThreadCols; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
      }
    }
    __syncthreads();
  }

  // Through shared memory: adds up the partial sums, and makes the writes contiguous.
#pragma unroll
  for (int m = 0; m < Tile::kThreadRows; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kThreadCols; ++n) {
      shared[(split * kSide + TilePlace<Tile::kThreadRows>(row_thread, Tile::kRowThreads, m)) * kSide +
             TilePlace<Tile::kThreadCols>(col_thread, Tile::kColThreads, n)] = sums[m][n];
    }
  }
  __syncthreads();
  const auto write = [&](auto* data) {
    data += (batch * p.nnz + id) * p.block * p.block + piece_row * p.block + piece_col;
    for (int i = thread; i < kSide * kSide; i += kSimtThreads) {
      float sum = 0.0f;
      for (int s = 0; s < Tile::kSplit; ++s) sum += shared[s * kSide * kSide + i];
      const int r = i / kSide, c = i % kSide;
      FromFloat(r < x_features && c < dy_features ? sum : 0.0f, data + r * p.block + c);
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.data));
  } else {
    write(static_cast<T*>(p.data));
  }
}

template <typename T, int kSide>
cudaError_t LaunchSide(const SddmmParams& p, cudaStream_t stream) {
  const std::int64_t pieces_a_side = p.block / kSide;
  return Launch<SddmmSimtKernel<T, kSide>>(p, p.batch * p.nnz * pieces_a_side * pieces_a_side, kSimtThreads, 0, stream);
}

}  // namespace

cudaError_t LaunchSddmmSimt(const SddmmParams& params, cudaStream_t stream) {
  if (params.type == ElementType::kF32) {
    switch (params.block) {
      case 8:
        return LaunchSide<float, 8>(params, stream);
      case 16:
        return LaunchSide<float, 16>(params, stream);
      case 32:
        return LaunchSide<float, 32>(params, stream);
      case 64:
      case 128:
        return LaunchSide<float, 64>(params, stream);
    }
  } else if (params.block == 8) {
    return params.type == ElementType::kBF16 ? LaunchSide<__nv_bfloat16, 8>(params, stream)
                                             : LaunchSide<__half, 8>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_blocksparse
