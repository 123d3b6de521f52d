// y = x W and dx = dy W^T by plain FMA, for float32 in any block size and for 16-bit elements in blocks of 8.
//
// A CTA computes 128 tokens x one block column (half a column for blocks of 128) and walks the column's list, in
// slices of the block up to 16 deep. Each thread keeps a small tile of sums in registers; the next slice of x and of
// the block travels from global memory into registers while the present one is multiplied from shared memory. Values
// become float on the way, so the element type does not matter to the products. What bounds it: FMA throughput for
// blocks of 32 and more; reads of shared memory and the latency of a step below.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "simt_tile.cuh"

namespace jax_blocksparse {
namespace {

template <int kWidth>
struct SimtMatmulTile {
  static constexpr int kTokens = 128;
  static constexpr int kFeatures = kWidth;  // the block size, or 64 for blocks of 128
  static constexpr int kDepth = std::min(kWidth, 16);
  static constexpr int kThreadFeatures = kWidth == 64 ? 8 : 4;
  static constexpr int kFeatureThreads = kFeatures / kThreadFeatures;
  static constexpr int kTokenThreads = kSimtThreads / kFeatureThreads;
  static constexpr int kThreadTokens = kTokens / kTokenThreads;
  static constexpr int kXPitch = kTokens + 4;
  static constexpr int kBlockPitch = kFeatures + 4;
  static constexpr int kXQuads = kTokens * kDepth / kQuad / kSimtThreads;  // that a thread moves for each slice
  static constexpr int kBlockQuads = (kFeatures * kDepth / kQuad + kSimtThreads - 1) / kSimtThreads;
  static_assert(kTokens * kDepth % (kQuad * kSimtThreads) == 0 && kThreadTokens * kTokenThreads == kTokens);
};

// Steps through the list of one output block, slice by slice, past entries that are out of range.
class ListWalk {
 public:
  __device__ ListWalk(const MatmulParams& p, std::int64_t batch, std::int64_t column)
      : order_(p.order + batch * p.order_batch_stride), inner_(p.inner + batch * p.order_batch_stride) {
    const std::int32_t* ptr = p.ptr + batch * p.ptr_batch_stride + column;
    index_ = max(0, min(ptr[0], p.nnz));
    end_ = max(0, min(ptr[1], p.nnz));
  }

  // Moves to the next block; false when there is none.
  __device__ bool NextBlock(const MatmulParams& p) {
    while (index_ < end_) {
      id = order_[index_++];
      if (id < 0 || id >= p.nnz) continue;
      row = inner_[id];
      if (row >= 0 && static_cast<std::int64_t>(row) * p.block < p.in_features) return true;
    }
    return false;
  }

  int id = 0;
  int row = 0;

 private:
  const std::int32_t* order_;
  const std::int32_t* inner_;
  int index_, end_;
};

template <typename T, int kWidth, bool kTranspose>
__global__ void __launch_bounds__(kSimtThreads) MatmulSimtKernel(const __grid_constant__ MatmulParams p) {
  using Tile = SimtMatmulTile<kWidth>;
  constexpr int kDepthQuads = Tile::kDepth / kQuad, kFeatureQuads = Tile::kFeatures / kQuad;
  __shared__ __align__(16) float x_slice[Tile::kDepth][Tile::kXPitch];
  __shared__ __align__(16) float block_slice[Tile::kDepth][Tile::kBlockPitch];

  const std::int64_t token_tiles = CeilDiv(p.tokens, Tile::kTokens);
  const std::int64_t feature_tiles = CeilDiv(p.out_features, Tile::kFeatures);
  const std::int64_t batch = blockIdx.x / (token_tiles * feature_tiles);
  const std::int64_t tile = blockIdx.x % (token_tiles * feature_tiles);
  const std::int64_t first_token = tile / feature_tiles * Tile::kTokens;
  const std::int64_t first_feature = tile % feature_tiles * Tile::kFeatures;
  const int feature_in_block = static_cast<int>(first_feature % p.block);
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const T* data = static_cast<const T*>(p.data) + batch * p.data_batch_stride;
  const bool x_aligned = IsQuadAligned(x, p.in_features);

  const int thread = threadIdx.x;
  Quad<float> next_x[Tile::kXQuads], next_block[Tile::kBlockQuads];
  ListWalk walk(p, batch, first_feature / p.block);
  int slice = 0;  // where in the block the slice starts

  // From global memory to registers; what lies outside of the matrix counts as zero, whatever a block holds there.
  const auto fetch = [&] {
    const std::int64_t first_in = static_cast<std::int64_t>(walk.row) * p.block + slice;
    const std::int64_t depth = p.in_features - first_in;
#pragma unroll
    for (int i = 0; i < Tile::kXQuads; ++i) {
      const int quad = thread + i * kSimtThreads;
      const std::int64_t token = first_token + quad / kDepthQuads;
      const int k = quad % kDepthQuads * kQuad;
      next_x[i] = LoadQuad(x + token * p.in_features + first_in + k, token < p.tokens ? depth - k : 0, x_aligned);
    }
    const T* block = data + static_cast<std::int64_t>(walk.id) * p.block * p.block;
#pragma unroll
    for (int i = 0; i < Tile::kBlockQuads; ++i) {
      const int quad = thread + i * kSimtThreads;
      if (quad >= Tile::kFeatures * kDepthQuads) break;
      if constexpr (kTranspose) {
        const int feature = quad / kDepthQuads, k = quad % kDepthQuads * kQuad;
        next_block[i] = LoadQuad(block + (feature_in_block + feature) * p.block + slice + k, depth - k, true);
      } else {
        const int k = quad / kFeatureQuads, feature = quad % kFeatureQuads * kQuad;
        next_block[i] =
            LoadQuad(block + (slice + k) * p.block + feature_in_block + feature, k < depth ? kQuad : 0, true);
      }
    }
  };
  // From registers to shared memory, depth first.
  const auto publish = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kXQuads; ++i) {
      const int quad = thread + i * kSimtThreads;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        x_slice[quad % kDepthQuads * kQuad + e][quad / kDepthQuads] = next_x[i].value[e];
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kBlockQuads; ++i) {
      const int quad = thread + i * kSimtThreads;
      if (quad >= Tile::kFeatures * kDepthQuads) break;
      if constexpr (kTranspose) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          block_slice[quad % kDepthQuads * kQuad + e][quad / kDepthQuads] = next_block[i].value[e];
        }
      } else {
        *reinterpret_cast<Quad<float>*>(&block_slice[quad / kFeatureQuads][quad % kFeatureQuads * kQuad]) =
            next_block[i];
      }
    }
  };

  const int feature_thread = thread % Tile::kFeatureThreads, token_thread = thread / Tile::kFeatureThreads;
  float sums[Tile::kThreadTokens][Tile::kThreadFeatures] = {};
  bool more = walk.NextBlock(p);
  if (more) fetch();
  while (more) {
    publish();
    __syncthreads();
    slice += Tile::kDepth;
    if (slice == p.block) {
      slice = 0;
      more = walk.NextBlock(p);
    }
    if (more) fetch();
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k) {
      float a[Tile::kThreadTokens], b[Tile::kThreadFeatures];
      ReadTileRow(a, x_slice[k], token_thread, Tile::kTokenThreads);
      ReadTileRow(b, block_slice[k], feature_thread, Tile::kFeatureThreads);
#pragma unroll
      for (int m = 0; m < Tile::kThreadTokens; ++m) {
#pragma unroll
        for (int n = 0; n < Tile::kThreadFeatures; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
      }
    }
    __syncthreads();
  }

  const auto write = [&](auto* y) {
    y += batch * p.tokens * p.out_features;
    const bool aligned = IsQuadAligned(y, p.out_features);
#pragma unroll
    for (int m = 0; m < Tile::kThreadTokens; ++m) {
      const std::int64_t token = first_token + TilePlace<Tile::kThreadTokens>(token_thread, Tile::kTokenThreads, m);
      if (token >= p.tokens) continue;
#pragma unroll
      for (int n = 0; n < Tile::kThreadFeatures; n += kQuad) {
        const std::int64_t feature =
            first_feature + TilePlace<Tile::kThreadFeatures>(feature_thread, Tile::kFeatureThreads, n);
        const float quad[kQuad] = {sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]};
        StoreQuad(y + token * p.out_features + feature, quad, p.out_features - feature, aligned);
      }
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.y));
  } else {
    write(static_cast<T*>(p.y));
  }
}

template <typename T, int kWidth>
cudaError_t LaunchWidth(const MatmulParams& p, cudaStream_t stream) {
  const std::int64_t ctas =
      p.batch * CeilDiv(p.tokens, SimtMatmulTile<kWidth>::kTokens) * CeilDiv(p.out_features, kWidth);
  return p.transpose ? Launch<MatmulSimtKernel<T, kWidth, true>>(p, ctas, kSimtThreads, 0, stream)
                     : Launch<MatmulSimtKernel<T, kWidth, false>>(p, ctas, kSimtThreads, 0, stream);
}

}  // namespace

cudaError_t LaunchMatmulSimt(const MatmulParams& params, cudaStream_t stream) {
  if (params.type == ElementType::kF32) {
    switch (params.block) {
      case 8:
        return LaunchWidth<float, 8>(params, stream);
      case 16:
        return LaunchWidth<float, 16>(params, stream);
      case 32:
        return LaunchWidth<float, 32>(params, stream);
      case 64:
      case 128:
        return LaunchWidth<float, 64>(params, stream);
    }
  } else if (params.block == 8) {
    return params.type == ElementType::kBF16 ? LaunchWidth<__nv_bfloat16, 8>(params, stream)
                                             : LaunchWidth<__half, 8>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_blocksparse
