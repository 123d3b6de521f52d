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

struct TinyParams {
  SddmmParams product;
  TinyRows x, dy;
};

// What lies where in shared memory, in bytes. In front is a chunk of zeros.
struct TinyRoom {
  std::uint32_t x = kChunkBytes, dy, end;
  __host__ __device__ explicit TinyRoom(const TinyParams& params) {
    const auto tokens = static_cast<std::uint32_t>(CeilDiv(params.product.tokens, kStepTokens) * kStepTokens);
    dy = x + tokens * params.x.Pitch();
    end = dy + tokens * params.dy.Pitch();
  }
};

template <typename T, int kBlock>
__global__ void __launch_bounds__(kTinyThreads) SddmmTinyKernel(const __grid_constant__ TinyParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kRows = std::min(kBlock, 16), kColPieces = kBlock / kPieceCols;
  constexpr int kPieces = kBlock / kRows * kColPieces;
  const SddmmParams& p = params.product;
  const int lane = threadIdx.x % 32, piece = blockIdx.x * (kTinyThreads / 32) + threadIdx.x / 32;
  const int id = piece / kPieces, first_row = piece / kColPieces % (kBlock / kRows) * kRows;
  const int first_col = piece % kColPieces * kPieceCols;
  const int row = LoadIf(id < p.nnz, p.rows + id, -1), col = LoadIf(id < p.nnz, p.cols + id, -1);
  const TinyRoom room(params);
  const std::uint32_t base = SharedAddress(shared);
  const int tokens = static_cast<int>(p.tokens), steps = CeilDiv(tokens, kStepTokens);
  params.x.Copy(base + room.x, p.x, tokens, steps * kStepTokens);
  params.dy.Copy(base + room.dy, p.dy, tokens, steps * kStepTokens);
  if (threadIdx.x == 0) StoreShared16(base, make_uint4(0, 0, 0, 0));
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
  const std::uint32_t x_pitch = has_x ? params.x.Pitch() : 0, dy_pitch = has_dy ? params.dy.Pitch() : 0;
  std::uint32_t x = has_x ? base + room.x + x_feature * 2 + (lane % 8 + lane / 16 * 8) * x_pitch : base;
  std::uint32_t dy = has_dy ? base + room.dy + dy_feature * 2 + lane * dy_pitch : base;
  float sums[4] = {};
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    std::uint32_t a[2][4], b[4];
    LoadMatrices<true>(a[0], x);
    LoadMatrices<true>(a[1], x + 16 * x_pitch);
    LoadMatrices<true>(b, dy);
    MultiplyAdd<T>(sums, a[0], b[0], b[1]);
    MultiplyAdd<T>(sums, a[1], b[2], b[3]);
    x += kStepTokens * x_pitch;
    dy += kStepTokens * dy_pitch;
  }

  if (id >= p.nnz) return;
  const std::int64_t place =
      std::int64_t{id} * (kBlock * kBlock) + (first_row + lane / 4) * kBlock + first_col + lane % 4 * 2;
  const auto store = [&](auto* to) {
    StorePair(to, sums[0], sums[1]);
    if (kRows == 16) StorePair(to + 8 * kBlock, sums[2], sums[3]);
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

template <typename T>
cudaError_t LaunchType(const TinyParams& params, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<Ctas(params.product), kTinyThreads, TinyRoom(params).end, stream>>>(params);
    return cudaGetLastError();
  };
  switch (params.product.block) {
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
  constexpr int kMax = kTinySharedBytes / 2;  // of any size, so that none below overflows
  return Is16Bit(p.type) && p.batch == 1 && is_aligned(p.x, p.in_features) && is_aligned(p.dy, p.out_features) &&
         p.tokens <= kMax && p.in_features <= kMax && p.out_features <= kMax && Ctas(p) <= kTinyMaxCtas &&
         std::int64_t{p.in_features + p.out_features + 2 * kChunk} * 2 *
                     (CeilDiv(p.tokens, kStepTokens) * kStepTokens) +
                 kChunkBytes <=
             kTinySharedBytes;
}

cudaError_t LaunchSddmmTiny(const SddmmParams& product, cudaStream_t stream) {
  const TinyParams params{product, TinyRows(product.in_features), TinyRows(product.out_features)};
  return product.type == ElementType::kBF16 ? LaunchType<__nv_bfloat16>(params, stream)
                                            : LaunchType<__half>(params, stream);
}

}  // namespace jax_blocksparse
