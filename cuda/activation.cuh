// Activations and their derivatives, in float.
#pragma once

#include <cuda_runtime.h>

#include "epilogue.h"

namespace jax_blocksparse {

struct ValueAndSlope {
  float value, slope;
};

__device__ __forceinline__ ValueAndSlope Activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return {x > 0.f || x != x ? x : 0.f, x > 0.f ? 1.f : 0.f};
    case Activation::kGeluExact: {
      const float below = 0.5f * erfcf(-0.70710678f * x);  // the normal distribution's integral up to x
      return {x * below, below + x * 0.39894228f * __expf(-0.5f * x * x)};
    }
    case Activation::kGeluTanh: {
      constexpr float kScale = 0.79788456f, kCubic = 0.044715f;
      const float t = tanhf(kScale * (x + kCubic * x * x * x));
      const float inner_slope = kScale * (1.f + 3.f * kCubic * x * x);
      return {0.5f * x * (1.f + t), 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * inner_slope};
    }
    case Activation::kSilu: {
      const float s = 1.f / (1.f + __expf(-x));
      return {x * s, s * (1.f + x * (1.f - s))};
    }
    case Activation::kNone:
      break;
  }
  return {x, 1.f};
}

}  // namespace jax_blocksparse
