// What can be done to a product before it is rounded: y = act(sum + bias) * scale, and act' beside it.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "ptx.cuh"

namespace jax_blocksparse::sm90 {

struct Activated {
  float value, derivative;
};

// A NaN stays one, as in JAX.
__device__ __forceinline__ Activated Activate(Activation activation, float x) {
  constexpr float kSqrtHalf = 0.70710678f, kInvSqrt2Pi = 0.39894228f;  // sqrt(1/2), 1/sqrt(2 pi)
  constexpr float kSqrt2OverPi = 0.79788456f, kCubic = 0.044715f;
  switch (activation) {
    case Activation::kRelu:
      return {x <= 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};
    case Activation::kGelu: {
      const float cdf = 0.5f + 0.5f * erff(x * kSqrtHalf);
      return {x * cdf, cdf + x * kInvSqrt2Pi * __expf(-0.5f * x * x)};
    }
    case Activation::kGeluTanh: {
      const float t = tanhf(kSqrt2OverPi * x * (1.f + kCubic * x * x));
      return {0.5f * x * (1.f + t),
              0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * kSqrt2OverPi * (1.f + 3.f * kCubic * x * x)};
    }
    case Activation::kSilu: {
      const float s = 1.f / (1.f + __expf(-x));
      return {x * s, s * (1.f + x * (1.f - s))};
    }
    default:
      return {x, 1.f};
  }
}

// Eight neighbours of an array of T or, if `is_float`, of float, in 16 or 32 bytes.
template <typename T>
__device__ __forceinline__ void LoadEight(const void* array, std::int64_t index, float (&values)[8]) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(array) + index));
  const T* parts = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(parts[i]);
}

template <typename T>
__device__ __forceinline__ void StoreEight(void* array, std::int64_t index, bool is_float, const float (&values)[8]) {
  if (is_float) {
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(array) + index);
    to[0] = {values[0], values[1], values[2], values[3]};
    to[1] = {values[4], values[5], values[6], values[7]};
  } else {
    *reinterpret_cast<uint4*>(static_cast<T*>(array) + index) = {
        Pack<T>(values[0], values[1]), Pack<T>(values[2], values[3]), Pack<T>(values[4], values[5]),
        Pack<T>(values[6], values[7])};
  }
}

// Finishes eight features of a token and writes them. `index` is where they are in y.
template <typename T>
__device__ __forceinline__ void FinishEight(const Epilogue& epilogue, void* y, bool is_float, std::int64_t index,
                                            int feature, float (&values)[8]) {
  float other[8];
  if (epilogue.bias != nullptr) {
    LoadEight<T>(epilogue.bias, feature, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += other[i];
  }
  if (epilogue.activation != Activation::kNone) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Activated result = Activate(epilogue.activation, values[i]);
      values[i] = result.value;
      other[i] = result.derivative;
    }
    if (epilogue.derivative != nullptr) StoreEight<T>(epilogue.derivative, index, is_float, other);
  }
  if (epilogue.scale != nullptr) {
    LoadEight<T>(epilogue.scale, index, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= other[i];
  }
  StoreEight<T>(y, index, is_float, values);
}

}  // namespace jax_blocksparse::sm90
