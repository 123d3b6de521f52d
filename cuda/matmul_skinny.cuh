// y = x W and dx = dy W^T for few tokens, on tensor cores by mma.sync, for 16-bit elements and all block sizes.
//
// Here the weights are read once and used for a handful of products, so everything serves to keep many bytes of them
// on their way. A CTA computes a slice: up to 64 output features (a block column, or a part of a wide one) of up to 64
// tokens. Each of its warps works alone: it takes every n-th unit of the column's list and copies the unit's weights
// and its piece of x (cp.async) two units ahead into a ring of its own; no two warps meet before the end, when they add
// up their sums in a fixed order. A unit is 32 deep: a part of a block, one of 32, two of 16 or four of 8. Weights are
// found by a block's id alone, x needs the block's row, one load later; so the first copies of weights do not wait for
// rows, and edges of W, which do depend on them, are cut off after the copy.
//
// Where some columns may be much longer than the average, CTAs of neighbouring columns form a cluster, which first
// takes all together what long lists have beyond that; and where blocks are small and many, x is packed first (see
// skinny_pack.cuh), which overlaps with the beginning of this kernel, and copied in whole pieces. What bounds it: up to
// 32 tokens DRAM, or for a short list its latencies (ptr, ids, weights, sums); for 64 tokens x, of which a slice of w
// features needs 4096 bytes from L2 for each 64 w bytes of weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels.h"
#include "launch.cuh"
#include "skinny_pack.cuh"
#include "skinny_results.cuh"
#include "skinny_unit.cuh"

namespace jax_blocksparse {

constexpr int kLineBytes = 128;

struct SkinnyParams {
  MatmulParams product;
  const void* x;  // packed, or as it is
  std::int64_t x_batch_stride;
  Epilogue epilogue;
  int kept;                           // entries of a long list that its own CTA takes care of
  std::uint32_t list_lines, x_lines;  // of 128 bytes, that order and inner, and x, take at least
};

inline std::uint32_t Lines(std::int64_t bytes) {
  return static_cast<std::uint32_t>(std::min<std::int64_t>(bytes / kLineBytes, std::numeric_limits<int>::max()));
}

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

// One warp's sums over the units of its walk, which are left in its ring.
template <typename T, bool kTranspose, typename Tile>
__device__ __forceinline__ void SumUnits(UnitWalk<Tile>& walk, const UnitCopier<T, kTranspose, Tile>& copier,
                                         unsigned char* ring_room) {
  using Layout = UnitLayout<Tile, kTranspose>;
  const int lane = threadIdx.x % 32;
  const std::uint32_t ring = SharedAddress(ring_room);

  std::uint32_t needs_cut = 0;  // bit s: the unit in stage s
  const auto barrier_of = [&](int stage) { return ring + Tile::kBarriers + stage * 8; };
  // Says whether the unit needs a cut.
  const auto copy_x = [&](int stage, int unit) {
    const std::uint32_t to = ring + stage * Tile::kUnitBytes;
    if constexpr (Tile::kIsPacked) {
      return copier.CopyPackedX(to, barrier_of(stage), walk, unit);
    } else {
      return copier.CopyX(to, walk, unit);
    }
  };
  if constexpr (Tile::kIsPacked) {
    if (lane == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) InitBarrier(barrier_of(stage), 1);
      FenceBarrierInit();
    }
    __syncwarp();
  }
#pragma unroll
  for (int unit = 0; unit < Tile::kAhead; ++unit) {
    if (walk.Exists(unit)) copier.CopyWeights(ring + unit * Tile::kUnitBytes, walk, unit);
  }
  WaitForPrerequisites();  // x may be packed by the kernel before
#pragma unroll
  for (int unit = 0; unit < Tile::kAhead; ++unit) {
    if (walk.Exists(unit) && copy_x(unit, unit)) needs_cut |= 1u << unit;
    CommitCopies();
  }

  float sums[Tile::kFeatureTiles][Tile::kTokenTiles][4] = {};
  int stage = 0, free_stage = Tile::kAhead;
  std::uint32_t parity = 0;
#pragma unroll 1
  for (int unit = 0; walk.Exists(unit); ++unit) {
    WaitForCopies<Tile::kAhead - 1>();
    if constexpr (Tile::kIsPacked) WaitBarrier(barrier_of(stage), parity);
    __syncwarp();  // this unit has landed, and no lane reads the one before any more
    if (const int ahead = unit + Tile::kAhead; walk.Exists(ahead)) {
      walk.MoveTo(ahead);
      copier.CopyWeights(ring + free_stage * Tile::kUnitBytes, walk, ahead);
      const std::uint32_t cut = copy_x(free_stage, ahead) ? 1 : 0;
      needs_cut = (needs_cut & ~(1u << free_stage)) | cut << free_stage;
    }
    CommitCopies();

    const std::uint32_t weights = ring + stage * Tile::kUnitBytes;
    if ((needs_cut >> stage & 1) != 0) copier.Cut(weights, walk, unit);
    std::uint32_t b[Tile::kTokenTiles][kUnitChunks];
    copier.ReadX(b, weights);
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
    if (stage == 0) parity ^= 1;
    free_stage = free_stage + 1 == Tile::kStages ? 0 : free_stage + 1;
  }

  WaitForCopies<0>();
  __syncwarp();  // the ring is free
  float* const room = reinterpret_cast<float*>(ring_room);
#pragma unroll
  for (int m = 0; m < Tile::kFeatureTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * Tile::kHalves; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, feature = m * 16 + i / 2 * 8 + lane / 4;
        room[token * Tile::kSumsPitch + feature] = sums[m][n][i];
      }
    }
  }
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Adds up what the warps of all CTAs of a cluster have left in their rings, in the order of warps, then of CTAs. The
// owner of the column gets it, behind its rings.
template <typename Tile>
__device__ __forceinline__ void AddUpCluster(float* shared_sums, int splits, bool is_owner) {
  constexpr int kRowVectors = Tile::kFeatures / 4, kRing = Tile::kRingBytes / 4;
  const auto for_each_vector = [&](const auto& function) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kTokens * kRowVectors; i += blockDim.x) {
      function(shared_sums + i / kRowVectors * Tile::kSumsPitch + i % kRowVectors * 4);
    }
  };
  for_each_vector([&](float* at) {
    float4 sum = *reinterpret_cast<const float4*>(at);
    for (int split = 1; split < splits; ++split) sum = sum + *reinterpret_cast<const float4*>(at + split * kRing);
    *reinterpret_cast<float4*>(at) = sum;
  });
  SyncCluster();
  if (is_owner) {
    for_each_vector([&](float* at) {
      float4 sum = LoadOfCluster16(SharedAddress(at), 0);
#pragma unroll
      for (int cta = 1; cta < kClusterCtas; ++cta) sum = sum + LoadOfCluster16(SharedAddress(at), cta);
      *reinterpret_cast<float4*>(at + splits * kRing) = sum;
    });
  }
  SyncCluster();  // the rings are free
}

template <typename T, bool kTranspose, typename Tile>
__global__ void __maxnreg__(Tile::kRegisters) MatmulSkinnyKernel(const __grid_constant__ SkinnyParams params) {
  extern __shared__ __align__(128) unsigned char shared[];

  const MatmulParams& p = params.product;
  const int warp = threadIdx.x / 32, splits = blockDim.x / 32, cta = blockIdx.y % kClusterCtas;
  const SkinnyPosition<Tile> at;
  ClusterLists<Tile> lists(p, at, params.kept);
  PrefetchOperands(params);
  UnitWalk<Tile> walk(p, at.batch);
  unsigned char* const ring = shared + warp * Tile::kRingBytes;

  // What is left over of long lists comes first.
  const std::uint32_t long_lists = lists.Start();
#pragma unroll 1
  for (std::uint32_t left = long_lists;; left &= left - 1) {
    const bool is_own = left == 0;
    const int owner = is_own ? cta : __ffs(left) - 1, begin = lists.Begin(owner), end = lists.End(owner);
    const int middle = (long_lists >> owner & 1) != 0 ? begin + params.kept : end;
    if (is_own) {
      walk.Start(begin, middle, warp, splits);
    } else {
      walk.Start(middle, end, cta * splits + warp, kClusterCtas * splits);
    }
    SumUnits(walk, UnitCopier<T, kTranspose, Tile>(p, params.x, params.x_batch_stride, at, owner % Tile::kSlices),
             ring);
    __syncthreads();
    if (is_own) break;
    AddUpCluster<Tile>(reinterpret_cast<float*>(shared), splits, owner == cta);
  }

  float* const shared_sums = reinterpret_cast<float*>(shared);
  const int parts = splits + (long_lists >> cta & 1);  // the last one is what the cluster has added up
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kTokens * (Tile::kFeatures / 8); i += blockDim.x) {
    const int tile_token = i / (Tile::kFeatures / 8), tile_feature = i % (Tile::kFeatures / 8) * 8;
    const std::int64_t token = at.first_token + tile_token;
    const int feature = at.column * Tile::kBlock + at.slice * Tile::kFeatures + tile_feature;
    if (token >= p.tokens || feature >= p.out_features) continue;
    float* const from = shared_sums + tile_token * Tile::kSumsPitch + tile_feature;
    if (p.f32_output) {
      WriteResults<float>(p, params.epilogue, at.batch, token, feature, from, parts, Tile::kRingBytes / 4);
    } else {
      WriteResults<T>(p, params.epilogue, at.batch, token, feature, from, parts, Tile::kRingBytes / 4);
    }
  }
}

template <typename Tile>
constexpr int SharedSumsBytes(bool shares) {
  return shares ? Tile::kSumsBytes : 0;
}

// As many warps as run at once on the whole GPU: more would wait for others to end, fewer read less at a time. But not
// many more than a column of average length has units for.
template <typename Tile>
int SkinnySplits(std::int64_t units, std::int64_t ctas, int sm_count, bool shares) {
  constexpr int kSmBytes = 228 * 1024, kReservedBytes = 1024;  // of an SM, and in it for each CTA
  // Clusters do not fit everywhere: room for one CTA more.
  const std::int64_t sm_ctas = CeilDiv(ctas, sm_count) + (shares ? 1 : 0);
  const std::int64_t fitting =
      std::min(65536 / 32 / Tile::kRegisters / sm_ctas,
               (kSmBytes / sm_ctas - kReservedBytes - SharedSumsBytes<Tile>(shares)) / Tile::kRingBytes);
  return static_cast<int>(std::clamp<std::int64_t>(std::min(fitting, 2 * units), 2, Tile::kMaxSplits));
}

template <typename T, bool kTranspose, typename Tile>
cudaError_t LaunchSkinnyTile(SkinnyParams params, bool has_clusters, int sm_count, cudaStream_t stream) {
  constexpr auto kKernel = MatmulSkinnyKernel<T, kTranspose, Tile>;
  const MatmulParams& p = params.product;
  const std::int64_t columns = CeilDiv(p.out_features, Tile::kBlock);
  const std::int64_t average = CeilDiv(p.nnz, columns), longest = CeilDiv(p.in_features, Tile::kBlock);

  // Sharing a list takes about as long as a column of so many units. Even patterns, which are not known here, must not
  // suffer: clusters need room for sums, which many tokens and packed x have none of. Slices would share one by one.
  constexpr bool kMayShare = !Tile::kIsPacked && Tile::kSlices == 1 && Tile::kTokens <= (Tile::kBlock < 32 ? 16 : 32);
  constexpr int kWorthwhile = (Tile::kTokens < 32 ? 64 : 32) * Tile::kPieces / Tile::kParts;
  params.kept = static_cast<int>(std::max<std::int64_t>(average, kWorthwhile));
  const bool shares = kMayShare && has_clusters && columns >= kClusterCtas && longest > std::int64_t{3} * params.kept;
  if (!shares) params.kept = std::numeric_limits<int>::max();

  const dim3 grid(CeilDiv(p.tokens, Tile::kTokens),
                  shares ? CeilDiv(columns, kClusterCtas) * kClusterCtas : columns * Tile::kSlices, p.batch);
  const int splits = SkinnySplits<Tile>(CeilDiv(average * Tile::kParts, Tile::kPieces),
                                        std::int64_t{grid.x} * grid.y * grid.z, sm_count, shares);
  const int allowed = Tile::kMaxSharedBytes + (has_clusters ? Tile::kSumsBytes : 0);
  if (const cudaError_t error = AllowSharedMemory<kKernel>(allowed); error != cudaSuccess) return error;

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(32 * splits);
  config.dynamicSmemBytes = splits * Tile::kRingBytes + SharedSumsBytes<Tile>(shares);
  config.stream = stream;
  config.attrs = attributes;
  if (shares) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, kClusterCtas, 1};
  }
  // With 64 tokens CTAs that start one by one take a tenth longer than the overlap saves.
  if (Tile::kIsPacked && Tile::kTokens <= 32) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kKernel, params);
}

template <typename T, int kBlock, int kTokens, bool kIsPacked>
cudaError_t LaunchSkinnyX(const SkinnyParams& params, bool has_clusters, int sm_count, cudaStream_t stream) {
  using Tile = SkinnyTile<kBlock, kTokens, kIsPacked>;
  return params.product.transpose ? LaunchSkinnyTile<T, true, Tile>(params, has_clusters, sm_count, stream)
                                  : LaunchSkinnyTile<T, false, Tile>(params, has_clusters, sm_count, stream);
}

// Packs x first if there is room for that, it may pay, and this is Hopper.
template <typename T, int kBlock, int kTokens>
cudaError_t LaunchSkinnyTokens(SkinnyParams params, void* packed_x, bool has_clusters, int sm_count,
                               cudaStream_t stream) {
  const MatmulParams& p = params.product;
  if constexpr (kBlock < kUnitDepth || (kBlock == kUnitDepth && kTokens == kFewTokens)) {
    if (packed_x != nullptr && has_clusters) {
      params.x = packed_x;
      params.x_batch_stride = p.x_batch_stride == 0 ? 0 : PackedXElements(p);
      const cudaError_t error = LaunchPackX<SkinnyTile<kBlock, kTokens, true>>(p, packed_x, stream);
      if (error != cudaSuccess) return error;
      return LaunchSkinnyX<T, kBlock, kTokens, true>(params, has_clusters, sm_count, stream);
    }
  }
  params.x = p.x;
  params.x_batch_stride = p.x_batch_stride;
  params.x_lines = Lines(p.tokens * p.in_features * std::int64_t{sizeof(T)});
  return LaunchSkinnyX<T, kBlock, kTokens, false>(params, has_clusters, sm_count, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchSkinnyBlock(const SkinnyParams& params, void* packed_x, bool has_clusters, int sm_count,
                              cudaStream_t stream) {
  const std::int64_t tokens = params.product.tokens;
  if (tokens <= 16) return LaunchSkinnyTokens<T, kBlock, 16>(params, packed_x, has_clusters, sm_count, stream);
  if (tokens <= 32) return LaunchSkinnyTokens<T, kBlock, 32>(params, packed_x, has_clusters, sm_count, stream);
  return LaunchSkinnyTokens<T, kBlock, 64>(params, packed_x, has_clusters, sm_count, stream);
}

// One source file for each element type instantiates this.
template <typename T>
cudaError_t LaunchMatmulSkinnyOf(const MatmulParams& product, const Epilogue& epilogue, void* packed_x,
                                 bool has_clusters, int sm_count, cudaStream_t stream) {
  SkinnyParams params{};
  params.product = product;
  params.epilogue = epilogue;
  params.list_lines = Lines(product.nnz * std::int64_t{sizeof(*product.order)});
  switch (product.block) {
    case 8:
      return LaunchSkinnyBlock<T, 8>(params, packed_x, has_clusters, sm_count, stream);
    case 16:
      return LaunchSkinnyBlock<T, 16>(params, packed_x, has_clusters, sm_count, stream);
    case 32:
      return LaunchSkinnyBlock<T, 32>(params, packed_x, has_clusters, sm_count, stream);
    case 64:
      return LaunchSkinnyBlock<T, 64>(params, packed_x, has_clusters, sm_count, stream);
    case 128:
      return LaunchSkinnyBlock<T, 128>(params, packed_x, has_clusters, sm_count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
