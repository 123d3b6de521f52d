// The epilogue as a pass of its own over y, for kernels that do not have one. It reads and writes everything once more,
// eight elements a thread where rows allow it; memory bounds it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "activation.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace jax_blocksparse {
namespace {

struct KernelParams {
  Epilogue epilogue;
  void* y;
  std::int64_t elements;        // of y
  std::int64_t batch_elements;  // of one batch element of y
  std::int32_t out_features;
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(256) EpilogueKernel(const KernelParams p) {
  const std::int64_t i = (blockIdx.x * std::int64_t{256} + threadIdx.x) * kWidth;
  if (i >= p.elements) return;
  using V = Vector<T, kWidth>;
  const std::int64_t batch = i / p.batch_elements;
  const auto feature = static_cast<std::int32_t>(i % p.out_features);  // its row ends at a multiple of kWidth
  V* y = reinterpret_cast<V*>(static_cast<T*>(p.y) + i);
  V values = *y, slopes, scales;
  if (p.epilogue.scale != nullptr) {
    const std::int64_t at = i - batch * p.batch_elements + batch * p.epilogue.scale_batch_stride;
    scales = *reinterpret_cast<const V*>(static_cast<const T*>(p.epilogue.scale) + at);
  }
  WithActivation(p.epilogue.activation, [&](auto activation) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float sum = static_cast<float>(values.element[j]);
      if (p.epilogue.bias != nullptr) sum += p.epilogue.bias[batch * p.epilogue.bias_batch_stride + feature + j];
      const ValueAndSlope result = Activate<decltype(activation)::value>(sum);
      const float scale = p.epilogue.scale == nullptr ? 1.f : static_cast<float>(scales.element[j]);
      values.element[j] = static_cast<T>(result.value * scale);
      slopes.element[j] = static_cast<T>(result.slope);
    }
  });
  *y = values;
  if (p.epilogue.slope != nullptr) *reinterpret_cast<V*>(static_cast<T*>(p.epilogue.slope) + i) = slopes;
}

// A thread for each feature and kSumTokens tokens.
template <typename T>
__global__ void __launch_bounds__(256) ColumnSumsKernel(const KernelParams p) {
  const std::int64_t tokens = p.batch_elements / p.out_features, rows = CeilDiv(tokens, kSumTokens);
  const std::int64_t i = blockIdx.x * std::int64_t{256} + threadIdx.x;
  const std::int64_t row = i / p.out_features, batch = row / rows, first = row % rows * kSumTokens;
  if (batch * p.batch_elements >= p.elements) return;
  const T* y = static_cast<const T*>(p.y) + batch * p.batch_elements + first * p.out_features + i % p.out_features;
  float sum = 0.f;
  for (std::int64_t token = first; token < min(first + kSumTokens, tokens); ++token, y += p.out_features) {
    sum += static_cast<float>(*y);
  }
  p.epilogue.column_sums[i] = sum;
}

template <typename T>
cudaError_t LaunchType(const KernelParams& params, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const auto is_aligned = [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; };
  const bool is_wide = params.out_features % kWide == 0 && is_aligned(params.y) && is_aligned(params.epilogue.scale) &&
                       is_aligned(params.epilogue.slope);
  const cudaError_t error =
      is_wide ? Launch<EpilogueKernel<T, kWide>>(params, CeilDiv(params.elements, 256 * kWide), 256, 0, stream)
              : Launch<EpilogueKernel<T, 1>>(params, CeilDiv(params.elements, 256), 256, 0, stream);
  if (error != cudaSuccess || params.epilogue.column_sums == nullptr) return error;
  const std::int64_t tokens = params.batch_elements / params.out_features;
  const std::int64_t sums = params.elements / tokens * CeilDiv(tokens, kSumTokens);
  return Launch<ColumnSumsKernel<T>>(params, CeilDiv(sums, 256), 256, 0, stream);
}

}  // namespace

cudaError_t LaunchEpilogue(const MatmulParams& product, const Epilogue& epilogue, cudaStream_t stream) {
  KernelParams params;
  params.epilogue = epilogue;
  params.y = product.y;
  params.batch_elements = product.tokens * product.out_features;
  params.elements = product.batch * params.batch_elements;
  params.out_features = product.out_features;
  if (product.f32_output) return LaunchType<float>(params, stream);
  return product.type == ElementType::kBF16 ? LaunchType<__nv_bfloat16>(params, stream)
                                            : LaunchType<__half>(params, stream);
}

}  // namespace jax_blocksparse
