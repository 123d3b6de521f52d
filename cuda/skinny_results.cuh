// The end of the kernels for few tokens: partial sums in shared memory become results.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "kernels.h"

namespace jax_blocksparse {

__device__ __forceinline__ void ReadEight(float (&values)[8], const float* from) {
  reinterpret_cast<float4*>(values)[0] = reinterpret_cast<const float4*>(from)[0];
  reinterpret_cast<float4*>(values)[1] = reinterpret_cast<const float4*>(from)[1];
}

template <typename U>
__device__ __forceinline__ void WriteEight(U* to, const float (&values)[8]) {
  alignas(16) U rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) rounded[i] = static_cast<U>(values[i]);
#pragma unroll
  for (int i = 0; i < int{sizeof(rounded) / 16}; ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(rounded)[i];
  }
}

// From shared memory to a place of any alignment, of which `existing` elements exist.
template <typename U>
__device__ __forceinline__ void CopyEight(U* to, const float* from, int existing, bool aligned) {
  if (aligned) {
    float values[8];
    ReadEight(values, from);
    WriteEight(to, values);
  } else {
#pragma unroll 1
    for (int i = 0; i < existing; ++i) to[i] = static_cast<U>(from[i]);
  }
}

// Writes what the epilogue makes of eight neighbouring sums of a token, each in `splits` parts that lie `stride` apart
// from `from` on, where there is room for two at least. Other threads are done with them.
template <typename U>
__device__ __forceinline__ void WriteResults(const MatmulParams& p, const Epilogue& e, int batch, std::int64_t token,
                                             int feature, float* from, int splits, int stride) {
  float sums[8];
  ReadEight(sums, from);
#pragma unroll 3
  for (int split = 1; split < splits; ++split) {
    float more[8];
    ReadEight(more, from + split * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] += more[j];
  }
  const std::int64_t place = token * p.out_features + feature, out = batch * p.tokens * p.out_features + place;
  const bool aligned = p.out_features % 8 == 0 &&
                       (reinterpret_cast<std::uintptr_t>(p.y) | reinterpret_cast<std::uintptr_t>(e.slope)) % 16 == 0;
  U* const y = static_cast<U*>(p.y) + out;
  if (aligned && e.IsIdentity()) {
    WriteEight(y, sums);
    return;
  }
  // By way of shared memory, so that the activation's code is there once.
  const int existing = min(8, p.out_features - feature);
  float* const slopes = from + stride;
#pragma unroll
  for (int j = 0; j < 8; ++j) from[j] = sums[j];
  if (!e.IsIdentity()) {
    WithActivation(e.activation, [&](auto activation) {
#pragma unroll 1
      for (int j = 0; j < existing; ++j) {
        const float bias = e.bias == nullptr ? 0.f : __ldg(e.bias + batch * e.bias_batch_stride + feature + j);
        const ValueAndSlope result = Activate<decltype(activation)::value>(from[j] + bias);
        const auto* scale = static_cast<const U*>(e.scale) + batch * e.scale_batch_stride + place + j;
        from[j] = e.scale == nullptr ? result.value : result.value * static_cast<float>(*scale);
        slopes[j] = result.slope;
      }
    });
    if (e.slope != nullptr) CopyEight(static_cast<U*>(e.slope) + out, slopes, existing, aligned);
  }
  CopyEight(y, from, existing, aligned);
}

}  // namespace jax_blocksparse
