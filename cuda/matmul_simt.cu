// y = x W and dx = dy W^T by plain FMA, for float32 in any block size and for 16-bit elements in blocks of 8.
//
// A CTA computes some tokens x one block column (half a column for blocks of 128) and walks the column's list, in
// slices of the block up to 16 deep. Slices of x and of the block travel to shared memory by asynchronous copies, two
// slices ahead. Each thread keeps a tile of sums, 8 x 8 where the block allows, in registers. Rows of x stay as they
// are, depth innermost: a thread reads four depths of a token at once, and rows are padded so that the tokens of a
// warp lie in different banks. Values become float on their way into registers, so the element type does not matter
// to the products. What bounds it: issuing FMAs for blocks of 32 and more, filling shared memory from L2 for smaller
// ones, since a piece of x serves one column.
#include <algorithm>

#include "column_walk.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "simt_tile.cuh"

namespace jax_blocksparse {
namespace {

// What the warps and threads of a CTA compute: kTokenWarps x kFeatureWarps of them, each kThreadTokens x kThreadFeatures
// a lane.
template <int kTokenWarpCount, int kFeatureWarpCount, int kTokensOfThread, int kFeaturesOfThread, int kFeaturesOfWarp,
          int kDepthOfSlice, int kStageCount, int kCtaCount>
struct SimtMatmulTile {
  static constexpr int kTokenWarps = kTokenWarpCount, kFeatureWarps = kFeatureWarpCount;
  static constexpr int kThreads = kTokenWarps * kFeatureWarps * 32;
  static constexpr int kThreadTokens = kTokensOfThread, kThreadFeatures = kFeaturesOfThread;
  static constexpr int kWarpFeatures = kFeaturesOfWarp;
  static constexpr int kFeatureLanes = kWarpFeatures / kThreadFeatures, kTokenLanes = 32 / kFeatureLanes;
  static constexpr int kWarpTokens = kTokenLanes * kThreadTokens;
  static constexpr int kTokens = kTokenWarps * kWarpTokens, kFeatures = kFeatureWarps * kWarpFeatures;
  static constexpr int kDepth = kDepthOfSlice;
  static constexpr int kStages = kStageCount;
  static constexpr int kCtas = kCtaCount;  // of an SM
  static constexpr int kDepthQuads = kDepth / kQuad, kFeatureQuads = kFeatures / kQuad;
  static constexpr int kDepthPitch = kDepth + kQuad;  // of rows along the depth
  static constexpr int kXQuads = kTokens * kDepthQuads / kThreads;  // that a thread copies for each slice
  static constexpr int kBlockQuads = (kFeatures * kDepthQuads + kThreads - 1) / kThreads;
  static constexpr int kXSlice = kTokens * kDepthPitch;
  static constexpr int kStage = kXSlice + kFeatures * kDepthPitch;  // elements
  static_assert(kFeatureLanes * kTokenLanes == 32 && kFeatures % kDepth == 0);
  static_assert(kTokens * kDepthQuads % kThreads == 0 && kThreads % kDepthQuads == 0);
  static_assert(kDepthPitch / kQuad % 2 == 1, "tokens of eight neighbouring lanes are in different banks");
};

// Copies four elements to shared memory, of which `valid` (any number) exist; the rest becomes zeros.
template <typename T>
__device__ __forceinline__ void CopyQuad(T* to, const T* from, std::int64_t valid, bool aligned) {
  if (aligned && valid >= kQuad) {
    CopyAsync<kQuad * sizeof(T)>(SharedAddress(to), from);
  } else {
    Quad<T> quad = {};
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < valid) quad.value[i] = from[i];
    }
    *reinterpret_cast<Quad<T>*>(to) = quad;
  }
}

template <typename T>
__device__ __forceinline__ void ReadQuad(float (&out)[kQuad], const T* from) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) out[i] = ToFloat(quad.value[i]);
}

template <typename T, typename Tile, bool kTranspose>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) MatmulSimtKernel(const __grid_constant__ MatmulParams p) {
  // Features of a thread that are neighbours. Those of blocks read along the depth lie in rows of their own: pairs of
  // rows keep the lanes of a warp in different banks.
  constexpr int kGroup = kTranspose ? 2 : kQuad;
  constexpr int kBlockPitch = kTranspose ? Tile::kDepthPitch : Tile::kFeatures;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);

  const std::int64_t token_tiles = CeilDiv(p.tokens, Tile::kTokens);
  const std::int64_t feature_tiles = CeilDiv(p.out_features, Tile::kFeatures);
  const std::int64_t batch = blockIdx.x / (token_tiles * feature_tiles);
  const std::int64_t tile = blockIdx.x % (token_tiles * feature_tiles);
  const std::int64_t first_token = tile / feature_tiles * Tile::kTokens;
  const std::int64_t first_feature = tile % feature_tiles * Tile::kFeatures;
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const T* data = static_cast<const T*>(p.data) + batch * p.data_batch_stride;
  const bool x_aligned = IsQuadAligned(x, p.in_features);
  const bool x_whole = x_aligned && first_token + Tile::kTokens <= p.tokens;

  const int thread = threadIdx.x;
  // Where this thread's first quad of x and of a block come from.
  const int x_row = thread / Tile::kDepthQuads, depth_place = thread % Tile::kDepthQuads * kQuad;
  const T* const own_x = x + (first_token + x_row) * p.in_features + depth_place;
  const T* const own_data = data + first_feature % p.block * (kTranspose ? p.block : 1);

  ColumnWalk<1> walk(p, batch, first_feature / p.block);
  auto block = walk.Next();
  int slice = 0;   // where in the block the next slice starts
  int copied = 0;  // slices

  // Starts to copy the next slice, if there is one. What lies outside of the matrix counts as zero, whatever a block
  // holds there; tokens that do not exist may be anything.
  const auto copy = [&](int stage) {
    if (block.row != decltype(walk)::kEnd) {
      T* const to = stages + stage * Tile::kStage;
      const std::int64_t first_in = static_cast<std::int64_t>(block.row) * p.block + slice;
      const std::int64_t depth = p.in_features - first_in;
      T* const to_x = to + x_row * Tile::kDepthPitch + depth_place;
      constexpr int kRows = Tile::kThreads / Tile::kDepthQuads;  // that all threads copy at once
      if (x_whole && depth >= Tile::kDepth) {
#pragma unroll
        for (int i = 0; i < Tile::kXQuads; ++i) {
          CopyAsync<kQuad * sizeof(T)>(SharedAddress(to_x + i * kRows * Tile::kDepthPitch),
                                       own_x + first_in + std::int64_t{i * kRows} * p.in_features);
        }
      } else {
        for (int i = 0; i < Tile::kXQuads; ++i) {
          if (first_token + x_row + i * kRows >= p.tokens) break;
          CopyQuad(to_x + i * kRows * Tile::kDepthPitch, own_x + first_in + std::int64_t{i * kRows} * p.in_features,
                   depth - depth_place, x_aligned);
        }
      }
      const T* from = own_data + static_cast<std::int64_t>(block.id) * (p.block * p.block);
#pragma unroll
      for (int i = 0; i < Tile::kBlockQuads; ++i) {
        const int quad = thread + i * Tile::kThreads;
        if (quad >= Tile::kFeatures * Tile::kDepthQuads) break;
        if constexpr (kTranspose) {
          const int feature = quad / Tile::kDepthQuads, k = quad % Tile::kDepthQuads * kQuad;
          CopyQuad(to + Tile::kXSlice + feature * kBlockPitch + k, from + feature * p.block + slice + k, depth - k,
                   true);
        } else {
          const int k = quad / Tile::kFeatureQuads, feature = quad % Tile::kFeatureQuads * kQuad;
          CopyQuad(to + Tile::kXSlice + k * kBlockPitch + feature, from + (slice + k) * p.block + feature,
                   k < depth ? kQuad : 0, true);
        }
      }
      ++copied;
      slice += Tile::kDepth;
      if (slice == p.block) {
        slice = 0;
        block = walk.Next();
      }
    }
    CommitCopies();
  };

  const int warp = thread / 32, lane = thread % 32;
  const int feature_lane = lane % Tile::kFeatureLanes, token_lane = lane / Tile::kFeatureLanes;
  const int warp_token = warp / Tile::kFeatureWarps * Tile::kWarpTokens + token_lane;
  const int warp_feature = warp % Tile::kFeatureWarps * Tile::kWarpFeatures + feature_lane * kGroup;
  const auto feature_place = [&](int n) {
    return warp_feature + n / kGroup * (Tile::kFeatureLanes * kGroup) + n % kGroup;
  };

  float sums[Tile::kThreadTokens][Tile::kThreadFeatures] = {};
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy(stage);
  int stage = 0, next_stage = Tile::kStages - 1;
  for (int multiplied = 0; multiplied < copied; ++multiplied) {
    WaitForCopies<Tile::kStages - 2>();
    __syncthreads();
    copy(next_stage);
    const T* const x_slice = stages + stage * Tile::kStage;
    const T* const block_slice = x_slice + Tile::kXSlice;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += kQuad) {
      float a[Tile::kThreadTokens][kQuad], b[Tile::kThreadFeatures][kQuad];
#pragma unroll
      for (int m = 0; m < Tile::kThreadTokens; ++m) {
        ReadQuad(a[m], x_slice + (warp_token + m * Tile::kTokenLanes) * Tile::kDepthPitch + k);
      }
      if constexpr (kTranspose) {
#pragma unroll
        for (int n = 0; n < Tile::kThreadFeatures; ++n) ReadQuad(b[n], block_slice + feature_place(n) * kBlockPitch + k);
      } else {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
#pragma unroll
          for (int n = 0; n < Tile::kThreadFeatures; n += kQuad) {
            float four[kQuad];
            ReadQuad(four, block_slice + (k + e) * kBlockPitch + feature_place(n));
#pragma unroll
            for (int i = 0; i < kQuad; ++i) b[n + i][e] = four[i];
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
#pragma unroll
        for (int m = 0; m < Tile::kThreadTokens; ++m) {
#pragma unroll
          for (int n = 0; n < Tile::kThreadFeatures; ++n) sums[m][n] = fmaf(a[m][e], b[n][e], sums[m][n]);
        }
      }
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == Tile::kStages ? 0 : next_stage + 1;
  }

  const auto write = [&](auto* y) {
    y += batch * p.tokens * p.out_features;
    const bool aligned = IsQuadAligned(y, p.out_features);
#pragma unroll
    for (int m = 0; m < Tile::kThreadTokens; ++m) {
      const std::int64_t token = first_token + warp_token + m * Tile::kTokenLanes;
      if (token >= p.tokens) break;
#pragma unroll
      for (int n = 0; n < Tile::kThreadFeatures; n += kGroup) {
        float group[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group[i] = sums[m][n + i];
        const std::int64_t feature = first_feature + feature_place(n);
        StoreGroup(y + token * p.out_features + feature, group, p.out_features - feature, aligned);
      }
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.y));
  } else {
    write(static_cast<T*>(p.y));
  }
}

template <typename T, typename Tile>
cudaError_t LaunchTile(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSharedBytes = Tile::kStages * Tile::kStage * sizeof(T);
  const std::int64_t ctas = p.batch * CeilDiv(p.tokens, Tile::kTokens) * CeilDiv(p.out_features, Tile::kFeatures);
  return p.transpose ? Launch<MatmulSimtKernel<T, Tile, true>>(p, ctas, Tile::kThreads, kSharedBytes, stream)
                     : Launch<MatmulSimtKernel<T, Tile, false>>(p, ctas, Tile::kThreads, kSharedBytes, stream);
}

// Up to 256 tokens, a warp goes through a column on its own, with 64 tokens of it.
template <typename T, typename LargeTile, typename SmallTile>
cudaError_t LaunchEither(const MatmulParams& p, cudaStream_t stream) {
  static_assert(SmallTile::kTokens == 64 && SmallTile::kThreads == 32);
  return p.tokens <= 256 ? LaunchTile<T, SmallTile>(p, stream) : LaunchTile<T, LargeTile>(p, stream);
}

// Warps along tokens and features, sums of a thread, features of a warp, depth, stages, CTAs of an SM.
template <typename T>
cudaError_t LaunchBlocksOf8(const MatmulParams& p, cudaStream_t stream) {
  return LaunchEither<T, SimtMatmulTile<4, 1, 4, 4, 8, 8, 4, 4>, SimtMatmulTile<1, 1, 4, 4, 8, 8, 4, 8>>(p, stream);
}

}  // namespace

#ifndef TRY
cudaError_t LaunchMatmulSimt(const MatmulParams& params, cudaStream_t stream) {
  if (params.type != ElementType::kF32) {
    if (params.block != 8) return cudaErrorInvalidValue;
    return params.type == ElementType::kBF16 ? LaunchBlocksOf8<__nv_bfloat16>(params, stream)
                                             : LaunchBlocksOf8<__half>(params, stream);
  }
  using Small = SimtMatmulTile<1, 1, 8, 8, 32, 16, 3, 8>;
  switch (params.block) {
    case 8:
      return LaunchBlocksOf8<float>(params, stream);
    case 16:
      return LaunchEither<float, SimtMatmulTile<4, 1, 8, 4, 16, 16, 3, 3>, SimtMatmulTile<1, 1, 8, 4, 16, 16, 3, 8>>(
          params, stream);
    case 32:
      return LaunchEither<float, SimtMatmulTile<4, 1, 8, 8, 32, 16, 3, 3>, Small>(params, stream);
    case 64:
    case 128:
      return LaunchEither<float, SimtMatmulTile<2, 2, 8, 8, 32, 16, 3, 3>, Small>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
#endif

}  // namespace jax_blocksparse
