// Activations and their derivatives, in float.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "epilogue.h"
#include "ptx.cuh"

namespace jax_blocksparse {

struct ValueAndSlope {
  float value, slope;
};

// 1 / (1 + 2^x), right to a few units in the last place.
__device__ __forceinline__ float Logistic2(float x) { return ReciprocalApprox(1.f + Exp2Approx(x)); }

template <Activation kActivation>
__device__ __forceinline__ ValueAndSlope Activate(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (kActivation == Activation::kRelu) {
    return {x > 0.f || x != x ? x : 0.f, x > 0.f ? 1.f : 0.f};
  } else if constexpr (kActivation == Activation::kGeluExact) {
    // The normal distribution's integral beyond |x|, by formula 7.1.26 of Abramowitz and Stegun: right to 3e-7.
    const float bell = Exp2Approx(-0.5f * kLog2E * x * x);
    const float t = ReciprocalApprox(1.f + 0.3275911f * 0.70710678f * fabsf(x));
    const float inner = 0.7107068705f + t * (-0.726576013f + t * 0.5307027145f);
    const float beyond = t * (0.127414796f + t * (-0.142248368f + t * inner)) * bell;
    const float below = x > 0.f ? 1.f - beyond : beyond;
    return {x * below, below + x * 0.39894228f * bell};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u)), which loses no digits where tanh is close to -1.
    constexpr float kScale = -2.f * 0.79788456f, kCubic = 0.044715f;
    const float square = x * x;
    const float below = Logistic2(x * (kLog2E * kScale + kLog2E * kScale * kCubic * square));
    const float value = x * below;
    return {value, below + (value * below - value) * (kScale + 3.f * kScale * kCubic * square)};
  } else if constexpr (kActivation == Activation::kSilu) {
    const float below = Logistic2(-kLog2E * x);
    const float value = x * below;
    return {value, below + (value - value * below)};
  } else {
    return {x, 1.f};
  }
}

// Calls a function with the activation as a type, std::integral_constant.
template <typename Function>
__device__ __forceinline__ void WithActivation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kNone:
      return function(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return function(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGeluExact:
      return function(std::integral_constant<Activation, Activation::kGeluExact>{});
    case Activation::kGeluTanh:
      return function(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return function(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace jax_blocksparse
