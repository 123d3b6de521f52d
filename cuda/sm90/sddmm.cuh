// Chooses the kernel for an element type; one source file for each type instantiates this.
#pragma once

#include "sddmm_large.cuh"
#include "sddmm_launch.cuh"
#include "sddmm_small.cuh"
#include "sddmm_tf32.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kUnit>
cudaError_t LaunchUnit(const SddmmParams& params, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    return LaunchSddmmShape<T, typename TF32Consumers<kUnit>::Shape, SddmmTF32Kernel<kUnit>>(params, stream);
  } else if constexpr (kUnit < 64) {
    return LaunchSddmmShape<T, typename SmallConsumers<T, kUnit>::Shape, SddmmSmallKernel<T, kUnit>>(params, stream);
  } else {
    return LaunchSddmmShape<T, typename LargeConsumers<T, kUnit>::Shape, SddmmLargeKernel<T, kUnit>>(params, stream);
  }
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
      return LaunchUnit<T, 16>(params, stream);
    case 32:
      return LaunchUnit<T, 32>(params, stream);
    case 64:
      return LaunchUnit<T, 64>(params, stream);
    case 128:
      return LaunchUnit<T, 128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
