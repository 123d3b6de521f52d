// Chooses the kernel for an element type; one source file for each type instantiates this.
#pragma once

#include "sddmm_large.cuh"
#include "sddmm_small.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kUnit>
cudaError_t LaunchLargeUnit(const SddmmParams& params, cudaStream_t stream) {
  using Shape = typename LargeConsumers<T, kUnit>::Shape;
  return LaunchSddmmShape<T, Shape, SddmmLargeKernel<T, kUnit>>(params, stream);
}

template <typename T, int kUnit>
cudaError_t LaunchSmallUnit(const SddmmParams& params, cudaStream_t stream) {
  using Shape = typename SmallConsumers<T, kUnit>::Shape;
  return LaunchSddmmShape<T, Shape, SddmmSmallKernel<T, kUnit>>(params, stream);
}

template <typename T>
cudaError_t LaunchSddmmOf(const SddmmParams& params, cudaStream_t stream) {
  const std::int64_t blocks = params.batch * params.nnz;
  if (blocks == 0) return cudaSuccess;
  if (params.tokens == 0 || params.in_features == 0 || params.out_features == 0) {
    return cudaMemsetAsync(params.data, 0, blocks * params.block * params.block * (params.f32_output ? 4 : 2), stream);
  }
  switch (params.unit) {
    case 16:
      return LaunchSmallUnit<T, 16>(params, stream);
    case 32:
      return LaunchSmallUnit<T, 32>(params, stream);
    case 64:
      return LaunchLargeUnit<T, 64>(params, stream);
    case 128:
      return LaunchLargeUnit<T, 128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
