// What the SIMT kernels share: four elements at a time between global memory, registers and shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_blocksparse {

constexpr int kQuad = 4;  // elements that a thread moves at once

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }

__device__ __forceinline__ void FromFloat(float value, float* to) { *to = value; }
__device__ __forceinline__ void FromFloat(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void FromFloat(float value, __half* to) { *to = __float2half_rn(value); }

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Group {
  T value[kCount];
};
template <typename T>
using Quad = Group<T, kQuad>;

template <typename T>
__device__ __forceinline__ bool IsQuadAligned(const T* pointer, std::int64_t pitch) {
  return pitch % kQuad == 0 && reinterpret_cast<std::uintptr_t>(pointer) % sizeof(Quad<T>) == 0;
}

// Copies four elements to shared memory, of which `valid` (any number: it is clamped) exist; the rest becomes zeros.
template <typename T>
__device__ __forceinline__ void CopyPartOfQuad(T* to, const T* from, std::int64_t valid) {
  Quad<T> quad = {};
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i < valid) quad.value[i] = from[i];
  }
  *reinterpret_cast<Quad<T>*>(to) = quad;
}

// Reads four elements from shared memory.
template <typename T>
__device__ __forceinline__ void ReadQuad(float* to, const T* from) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) to[i] = ToFloat(quad.value[i]);
}

// Writes those of a group of results that exist; `aligned` is about a group of four.
template <typename U, int kCount>
__device__ __forceinline__ void StoreGroup(U* to, const float (&from)[kCount], std::int64_t valid, bool aligned) {
  if (aligned && valid >= kCount) {
    Group<U, kCount> group;
#pragma unroll
    for (int i = 0; i < kCount; ++i) FromFloat(from[i], &group.value[i]);
    *reinterpret_cast<Group<U, kCount>*>(to) = group;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) FromFloat(from[i], to + i);
    }
  }
}

}  // namespace jax_blocksparse
