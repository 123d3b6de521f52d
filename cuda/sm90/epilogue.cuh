// The epilogue of a product, for four neighbouring features of a token: more would want more registers than the sums,
// which are still there, leave.
#pragma once

#include <cstdint>

#include "../activation.cuh"
#include "../epilogue.h"
#include "ptx.cuh"

namespace jax_blocksparse::sm90 {

// Four values that follow each other in an array of T or, if `is_float`, of float.
template <typename T>
__device__ __forceinline__ void LoadFour(const void* array, std::int64_t index, bool is_float, float (&values)[4]) {
  if (is_float) {
    const float4 raw = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(array) + index));
    values[0] = raw.x;
    values[1] = raw.y;
    values[2] = raw.z;
    values[3] = raw.w;
  } else {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(array) + index));
    const T* parts = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = static_cast<float>(parts[i]);
  }
}

template <typename T>
__device__ __forceinline__ void StoreFour(void* array, std::int64_t index, bool is_float, const float (&values)[4]) {
  if (is_float) {
    *reinterpret_cast<float4*>(static_cast<float*>(array) + index) = {values[0], values[1], values[2], values[3]};
  } else {
    *reinterpret_cast<uint2*>(static_cast<T*>(array) + index) = {Pack<T>(values[0], values[1]),
                                                                 Pack<T>(values[2], values[3])};
  }
}

// Finishes four sums and writes them to y. `index` is where the first belongs in y[batch].
template <typename T>
__device__ __forceinline__ void FinishFour(const Epilogue& epilogue, void* y, bool is_float,
                                           std::int64_t batch_elements, int batch, std::int64_t index, int feature,
                                           float (&values)[4]) {
  const std::int64_t place = batch * batch_elements + index;
  float others[4];
  if (epilogue.bias != nullptr) {
    LoadFour<T>(epilogue.bias, batch * epilogue.bias_batch_stride + feature, true, others);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] += others[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const ValueAndSlope result = Activate(epilogue.activation, values[i]);
    values[i] = result.value;
    others[i] = result.slope;
  }
  if (epilogue.slope != nullptr) StoreFour<T>(epilogue.slope, place, is_float, others);
  if (epilogue.scale != nullptr) {
    LoadFour<T>(epilogue.scale, batch * epilogue.scale_batch_stride + index, is_float, others);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] *= others[i];
  }
  StoreFour<T>(y, place, is_float, values);
}

}  // namespace jax_blocksparse::sm90
