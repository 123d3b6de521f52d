// Chooses the kernel for an element type; one source file for each type instantiates this.
#pragma once

#include "sddmm_large.cuh"
#include "sddmm_small.cuh"
#include "sddmm_tf32.cuh"

namespace jax_blocksparse::sm90 {

constexpr std::int64_t kClustersOfTwo = 66;  // that an H100 runs at a time

template <typename T, int kUnit>
cudaError_t LaunchUnit(const SddmmParams& params, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    SddmmParams chosen = params;
    // In TF32 a unit of 128 takes so long that two CTAs had better share one than leave half of the SMs without any.
    if (kUnit == 128 && params.split == 1 && params.batch * params.plan_tiles <= kClustersOfTwo) chosen.split = 2;
    return LaunchSddmmShape<T, typename TF32Consumers<kUnit>::Shape, SddmmTF32Kernel<kUnit>>(chosen, stream);
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
