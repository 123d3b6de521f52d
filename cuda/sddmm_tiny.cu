// The blocks of x^T dy for so few tokens and features that a CTA has room for all of x and dy, on tensor cores.
//
// As in matmul_tiny.cu only latency matters, and there is one read from memory: each CTA asks for all of x and dy, and
// each of its warps for the row and the column of its block. A warp then computes 16 x 8 entries of a block (8 x 8 of
// the smallest) over all tokens, 32 at a time. What bounds it: the launch, the read, the chain of products.
#include <cstdint>

#include "kernels.h"
#include "mma_tile.cuh"
#include "tiny.cuh"

namespace jax_blocksparse {
namespace {

constexpr int kStepTokens = 32;
constexpr int kPieceCols = kChunk;

// In front of shared memory is a chunk of zeros, then x and dy.
constexpr std::uint32_t kX = kChunkBytes;

// Parameters are read from memory, too, a line at a time: no more of them than needed.
struct TinyParams {
  const void *x, *dy;
  const std::int32_t *rows, *cols;
  void* data;
  std::int32_t nnz, in_features, out_features, tokens, steps;
  TinyRows x_rows, dy_rows;
  std::uint32_t dy_place;  // in shared memory
  bool f32_output;
};

template <typename T, int kBlock>
__global__ void __launch_bounds__(kTinyThreads) SddmmTinyKernel(const __grid_constant__ TinyParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr std::uint32_t kRows = std::min(kBlock, 16), kColPieces = kBlock / kPieceCols;
  constexpr std::uint32_t kPieces = kBlock / kRows * kColPieces;
  static_assert(kPieces * kRows * kPieceCols == kBlock * kBlock && (kRows == 16 || kBlock == 8));
  const std::uint32_t lane = threadIdx.x % 32, piece = blockIdx.x * (kTinyThreads / 32) + threadIdx.x / 32;
  const std::uint32_t id = piece / kPieces, first_row = piece / kColPieces % (kBlock / kRows) * kRows;
  const std::uint32_t first_col = piece % kColPieces * kPieceCols;
  const std::uint32_t base = Now(SharedAddress(shared));
  const std::uint32_t x_chunks = p.steps * kStepTokens * p.x_rows.chunks;
  const std::uint32_t dy_chunks = p.steps * kStepTokens * p.dy_rows.chunks;

  const bool has_id = id < static_cast<std::uint32_t>(p.nnz);
  const int row = LoadIf(has_id, p.rows + id, -1), col = LoadIf(has_id, p.cols + id, -1);
  const auto copy_x = [&](std::uint32_t i) { p.x_rows.CopyChunk(base + kX, p.x, p.tokens, i); };
  const auto copy_dy = [&](std::uint32_t i) { p.dy_rows.CopyChunk(base + p.dy_place, p.dy, p.tokens, i); };
  ForShare(x_chunks, copy_x);
  ForShare(dy_chunks, copy_dy);
  if (threadIdx.x == 0) StoreShared16(base, make_uint4(0, 0, 0, 0));
  ForRestOfShare(x_chunks, copy_x);
  ForRestOfShare(dy_chunks, copy_dy);
  CommitCopies();
  WaitForCopies<0>();
  __syncthreads();

  // Lanes give ldmatrix rows of x in the order (tokens 0-7, features 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), and
  // rows of dy by token.
  const bool is_block =
      row >= 0 && row < CeilDiv(p.in_features, kBlock) && col >= 0 && col < CeilDiv(p.out_features, kBlock);
  const int x_feature = is_block ? row * kBlock + first_row + lane / 8 % 2 * kChunk : p.in_features;
  const int dy_feature = is_block ? col * kBlock + first_col : p.out_features;
  const bool has_x = x_feature < p.in_features && lane / 8 % 2 * kChunk < kRows, has_dy = dy_feature < p.out_features;
  const std::uint32_t x_pitch = has_x ? p.x_rows.Pitch() : 0, dy_pitch = has_dy ? p.dy_rows.Pitch() : 0;
  std::uint32_t x = has_x ? base + kX + x_feature * 2 + (lane % 8 + lane / 16 * 8) * x_pitch : base;
  std::uint32_t dy = has_dy ? base + p.dy_place + dy_feature * 2 + lane * dy_pitch : base;
  float sums[2][4] = {};  // of either half of a step: shorter chains
#pragma unroll 2
  for (int step = 0; step < p.steps; ++step) {
    std::uint32_t a[2][4], b[4];
    LoadMatrices<true>(a[0], x);
    LoadMatrices<true>(a[1], x + 16 * x_pitch);
    LoadMatrices<true>(b, dy);
    MultiplyAdd<T>(sums[0], a[0], b[0], b[1]);
    MultiplyAdd<T>(sums[1], a[1], b[2], b[3]);
    x += kStepTokens * x_pitch;
    dy += kStepTokens * dy_pitch;
  }

  if (!has_id) return;
  const std::int64_t place =
      std::int64_t{id} * (kBlock * kBlock) + (first_row + lane / 4) * kBlock + first_col + lane % 4 * 2;
  const auto store = [&](auto* to) {
    StorePair(to, sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]);
    if (kRows == 16) StorePair(to + 8 * kBlock, sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
  };
  if (p.f32_output) {
    store(static_cast<float*>(p.data) + place);
  } else {
    store(static_cast<T*>(p.data) + place);
  }
}

std::int64_t Ctas(const SddmmParams& p) {
  const std::int64_t pieces = p.block / std::min(p.block, 16) * (p.block / kPieceCols);
  return CeilDiv(p.nnz * pieces, kTinyThreads / 32);
}

std::int64_t SharedBytes(const SddmmParams& p) {
  const std::int64_t tokens = CeilDiv(p.tokens, kStepTokens) * kStepTokens;
  return kX + tokens * (TinyRows(p.in_features).Pitch() + std::int64_t{TinyRows(p.out_features).Pitch()});
}

template <typename T>
cudaError_t LaunchType(const SddmmParams& product, const TinyParams& params, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<Ctas(product), kTinyThreads, SharedBytes(product), stream>>>(params);
    return cudaGetLastError();
  };
  switch (product.block) {
    case 8:
      return launch(SddmmTinyKernel<T, 8>);
    case 16:
      return launch(SddmmTinyKernel<T, 16>);
    case 32:
      return launch(SddmmTinyKernel<T, 32>);
    case 64:
      return launch(SddmmTinyKernel<T, 64>);
    default:
      return launch(SddmmTinyKernel<T, 128>);
  }
}

}  // namespace

bool CanLaunchSddmmTiny(const SddmmParams& p) {
  const auto is_aligned = [](const void* array, std::int32_t features) {
    return features % kChunk == 0 && reinterpret_cast<std::uintptr_t>(array) % kChunkBytes == 0;
  };
  return Is16Bit(p.type) && p.batch == 1 && is_aligned(p.x, p.in_features) && is_aligned(p.dy, p.out_features) &&
         p.tokens <= kTinySharedBytes && p.in_features <= kTinySharedBytes && p.out_features <= kTinySharedBytes &&
         Ctas(p) <= kTinyMaxCtas && SharedBytes(p) <= kTinySharedBytes;
}

cudaError_t LaunchSddmmTiny(const SddmmParams& p, cudaStream_t stream) {
  TinyParams params;
  params.x = p.x;
  params.dy = p.dy;
  params.rows = p.rows;
  params.cols = p.cols;
  params.data = p.data;
  params.nnz = p.nnz;
  params.in_features = p.in_features;
  params.out_features = p.out_features;
  params.tokens = static_cast<std::int32_t>(p.tokens);
  params.steps = static_cast<std::int32_t>(CeilDiv(p.tokens, kStepTokens));
  params.x_rows = TinyRows(p.in_features);
  params.dy_rows = TinyRows(p.out_features);
  params.dy_place = kX + params.steps * kStepTokens * params.x_rows.Pitch();
  params.f32_output = p.f32_output;
  return p.type == ElementType::kBF16 ? LaunchType<__nv_bfloat16>(p, params, stream)
                                      : LaunchType<__half>(p, params, stream);
}

}  // namespace jax_blocksparse
