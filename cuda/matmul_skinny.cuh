// y = x W and dx = dy W^T for few tokens, on tensor cores by mma.sync, for 16-bit elements and all block sizes.
//
// Here the weights are read once and used for a handful of products, so everything serves to keep many bytes of them
// on their way. A CTA computes a slice: up to 64 output features (a block column, or a part of a wide one) of up to 64
// tokens. Each of its warps works alone: it takes every n-th unit of the column's list and copies the unit's weights
// and its piece of x (cp.async) two units ahead into a ring of its own; no two warps meet before the end, when they add
// up their sums in a fixed order. A unit is 32 deep: a part of a block, one of 32, two of 16 or four of 8. Weights are
// found by a block's id alone, x needs the block's row, one load later; so the first copies of weights do not wait for
// rows, and edges of W, which do depend on them, are cut off after the copy. What bounds it: up to 32 tokens DRAM, or
// for a short list its latencies (ptr, ids, weights, sums); for 64 tokens x, of which a slice of w features needs 4096
// bytes from L2 for each 64 w bytes of weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels.h"
#include "launch.cuh"
#include "skinny_results.cuh"
#include "skinny_unit.cuh"

namespace jax_blocksparse {

constexpr int kLineBytes = 128;

struct SkinnyParams {
  MatmulParams product;
  Epilogue epilogue;
  std::uint32_t list_lines, x_lines;  // of 128 bytes, that order and inner, and x, take at least
};

// The first CTAs have L2 read the operands that are found by way of others, a line a thread, while all wait for ptr.
__device__ __forceinline__ void PrefetchOperands(const SkinnyParams& params) {
  const MatmulParams& p = params.product;
  const std::uint32_t cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const std::uint32_t line = cta * blockDim.x + threadIdx.x;
  const std::uint64_t byte = std::uint64_t{line} * kLineBytes;
  if (line < params.list_lines) {
    Prefetch(reinterpret_cast<const char*>(p.order) + byte);
    Prefetch(reinterpret_cast<const char*>(p.inner) + byte);
  }
  if (line < params.x_lines) Prefetch(static_cast<const char*>(p.x) + byte);
}

template <typename T, bool kTranspose, typename Tile>
__global__ void __maxnreg__(Tile::kRegisters) MatmulSkinnyKernel(const __grid_constant__ SkinnyParams params) {
  using Layout = UnitLayout<Tile, kTranspose>;
  extern __shared__ __align__(128) unsigned char shared[];

  const MatmulParams& p = params.product;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = blockDim.x / 32;
  const SkinnyPosition<Tile> at;
  UnitWalk<Tile> walk(p, at.batch, at.column, warp, splits);
  PrefetchOperands(params);
  const UnitCopier<T, kTranspose, Tile> copier(p, at);
  walk.Start();
  const std::uint32_t ring = SharedAddress(shared) + warp * Tile::kRingBytes;

  std::uint32_t needs_cut = 0;  // bit s: the unit in stage s
#pragma unroll
  for (int unit = 0; unit < Tile::kAhead; ++unit) {
    if (walk.Exists(unit)) copier.CopyWeights(ring + unit * Tile::kUnitBytes, walk, unit);
  }
#pragma unroll
  for (int unit = 0; unit < Tile::kAhead; ++unit) {
    if (walk.Exists(unit) && copier.CopyX(ring + unit * Tile::kUnitBytes, walk, unit)) needs_cut |= 1u << unit;
    CommitCopies();
  }

  float sums[Tile::kFeatureTiles][Tile::kTokenTiles][4] = {};
  int stage = 0, free_stage = Tile::kAhead;
#pragma unroll 1
  for (int unit = 0; walk.Exists(unit); ++unit) {
    WaitForCopies<Tile::kAhead - 1>();
    __syncwarp();  // this unit has landed, and no lane reads the one before any more
    if (const int ahead = unit + Tile::kAhead; walk.Exists(ahead)) {
      const std::uint32_t to = ring + free_stage * Tile::kUnitBytes;
      static_assert(Tile::kAhead == UnitWalk<Tile>::kFirstMove);
      walk.MoveTo(ahead);
      copier.CopyWeights(to, walk, ahead);
      const std::uint32_t cut = copier.CopyX(to, walk, ahead) ? 1 : 0;
      needs_cut = (needs_cut & ~(1u << free_stage)) | cut << free_stage;
    }
    CommitCopies();

    const std::uint32_t weights = ring + stage * Tile::kUnitBytes;
    if ((needs_cut >> stage & 1) != 0) copier.CutWeights(weights, walk, unit);
    const std::uint32_t x = weights + Tile::kWeightBytes + TileOffset<kUnitDepth>(lane % 8, lane / 8);
    std::uint32_t b[Tile::kTokenTiles][4];
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) LoadMatrices<false>(b[n], x + n * (8 * kUnitDepth * 2));
#pragma unroll
    for (int m = 0; m < Tile::kFeatureTiles; ++m) {
      std::uint32_t a[kDepthSteps][4];
      Layout::Load(a, weights, m, lane);
#pragma unroll
      for (int n = 0; n < Tile::kTokenTiles; ++n) {
        MultiplyAdd<T>(sums[m][n], a[0], b[n][0], b[n][1]);
        MultiplyAdd<T>(sums[m][n], a[1], b[n][2], b[n][3]);
      }
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == Tile::kStages ? 0 : free_stage + 1;
  }

  WaitForCopies<0>();
  __syncwarp();  // the ring is free
  float* const shared_sums = reinterpret_cast<float*>(shared);
  float* const own_sums = shared_sums + warp * (Tile::kRingBytes / 4);
#pragma unroll
  for (int m = 0; m < Tile::kFeatureTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * Tile::kHalves; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, feature = m * 16 + i / 2 * 8 + lane / 4;
        own_sums[token * Tile::kSumsPitch + feature] = sums[m][n][i];
      }
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kTokens * (Tile::kFeatures / 8); i += blockDim.x) {
    const int tile_token = i / (Tile::kFeatures / 8), tile_feature = i % (Tile::kFeatures / 8) * 8;
    const std::int64_t token = at.first_token + tile_token;
    const int feature = at.column * Tile::kBlock + at.slice * Tile::kFeatures + tile_feature;
    if (token >= p.tokens || feature >= p.out_features) continue;
    float* const from = shared_sums + tile_token * Tile::kSumsPitch + tile_feature;
    if (p.f32_output) {
      WriteResults<float>(p, params.epilogue, at.batch, token, feature, from, splits, Tile::kRingBytes / 4);
    } else {
      WriteResults<T>(p, params.epilogue, at.batch, token, feature, from, splits, Tile::kRingBytes / 4);
    }
  }
}

// As many warps as run at once on the whole GPU: more would wait for others to end, fewer read less at a time. But not
// many more than a column of average length has units for.
template <typename Tile>
int SkinnySplits(const MatmulParams& p, std::int64_t ctas, int sm_count) {
  const std::int64_t fitting = Tile::kWarpsPerSm / CeilDiv(ctas, sm_count);
  const std::int64_t units =
      CeilDiv(2 * std::int64_t{p.nnz} * Tile::kParts, Tile::kPieces * CeilDiv(p.out_features, Tile::kBlock));
  return static_cast<int>(std::clamp<std::int64_t>(std::min(fitting, units), 2, Tile::kMaxSplits));
}

template <typename T, bool kTranspose, typename Tile>
cudaError_t LaunchSkinnyTile(const SkinnyParams& params, int sm_count, cudaStream_t stream) {
  constexpr auto kKernel = MatmulSkinnyKernel<T, kTranspose, Tile>;
  if (const cudaError_t error = AllowSharedMemory<kKernel>(Tile::kMaxSharedBytes); error != cudaSuccess) return error;
  const MatmulParams& p = params.product;
  const dim3 grid(CeilDiv(p.tokens, Tile::kTokens), CeilDiv(p.out_features, Tile::kBlock) * Tile::kSlices, p.batch);
  const int splits = SkinnySplits<Tile>(p, std::int64_t{grid.x} * grid.y * grid.z, sm_count);
  kKernel<<<grid, 32 * splits, splits * Tile::kRingBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kBlock, int kTokens>
cudaError_t LaunchSkinnyTokens(const SkinnyParams& params, int sm_count, cudaStream_t stream) {
  using Tile = SkinnyTile<kBlock, kTokens>;
  return params.product.transpose ? LaunchSkinnyTile<T, true, Tile>(params, sm_count, stream)
                                  : LaunchSkinnyTile<T, false, Tile>(params, sm_count, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchSkinnyBlock(const SkinnyParams& params, int sm_count, cudaStream_t stream) {
  if (params.product.tokens <= 16) return LaunchSkinnyTokens<T, kBlock, 16>(params, sm_count, stream);
  if (params.product.tokens <= 32) return LaunchSkinnyTokens<T, kBlock, 32>(params, sm_count, stream);
  return LaunchSkinnyTokens<T, kBlock, 64>(params, sm_count, stream);
}

// One source file for each element type instantiates this.
template <typename T>
cudaError_t LaunchMatmulSkinnyOf(const MatmulParams& product, const Epilogue& epilogue, int sm_count,
                                 cudaStream_t stream) {
  const auto lines = [](std::int64_t bytes) {
    return static_cast<std::uint32_t>(std::min<std::int64_t>(bytes / kLineBytes, std::numeric_limits<int>::max()));
  };
  const SkinnyParams params{product, epilogue, lines(product.nnz * std::int64_t{sizeof(*product.order)}),
                            lines(product.tokens * product.in_features * std::int64_t{sizeof(T)})};
  switch (product.block) {
    case 8:
      return LaunchSkinnyBlock<T, 8>(params, sm_count, stream);
    case 16:
      return LaunchSkinnyBlock<T, 16>(params, sm_count, stream);
    case 32:
      return LaunchSkinnyBlock<T, 32>(params, sm_count, stream);
    case 64:
      return LaunchSkinnyBlock<T, 64>(params, sm_count, stream);
    case 128:
      return LaunchSkinnyBlock<T, 128>(params, sm_count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
