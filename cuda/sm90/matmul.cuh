// Chooses the kernel and its tile for an element type; one source file for each type instantiates this.
#pragma once

#include "matmul_large.cuh"
#include "matmul_small.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kBlock>
cudaError_t LaunchSmallTile(const MatmulParams& params, cudaStream_t stream) {
  return params.tile_features == 256 ? LaunchSmall<T, kBlock, 128, 256, 2>(params, stream)
                                     : LaunchSmall<T, kBlock, 256, 128, 2>(params, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchLargeTile(const MatmulParams& params, cudaStream_t stream) {
  return params.transpose ? LaunchLarge<T, kBlock, true, 1>(params, stream)
                          : LaunchLarge<T, kBlock, false, 1>(params, stream);
}

template <typename T>
cudaError_t LaunchMatmulOf(const MatmulParams& params, cudaStream_t stream) {
  const std::int64_t elements = params.batch * params.tokens * params.out_features;
  if (elements == 0) return cudaSuccess;
  if (params.nnz == 0 || params.in_features == 0) {
    return cudaMemsetAsync(params.y, 0, elements * (params.f32_output ? 4 : 2), stream);
  }
  switch (params.block) {
    case 8:
      return LaunchSmallTile<T, 8>(params, stream);
    case 16:
      return LaunchSmallTile<T, 16>(params, stream);
    case 32:
      return LaunchSmallTile<T, 32>(params, stream);
    case 64:
      return LaunchLargeTile<T, 64>(params, stream);
    case 128:
      return LaunchLargeTile<T, 128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
