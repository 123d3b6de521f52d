// What the SIMT kernels share: four elements at a time between global memory, registers and shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_blocksparse {

constexpr int kSimtThreads = 128;
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

// Four elements of which `valid` (any number: it is clamped) exist; the rest are zeros.
template <typename T>
__device__ __forceinline__ Quad<float> LoadQuad(const T* from, std::int64_t valid, bool aligned) {
  Quad<float> result;
  if (aligned && valid >= kQuad) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) result.value[i] = ToFloat(quad.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) result.value[i] = i < valid ? ToFloat(from[i]) : 0.0f;
  }
  return result;
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

// Element i of the kPerThread that thread `index` of `threads` has along one side of a tile: groups of up to four
// neighbours, the groups of all threads side by side, so that threads of a warp read neighbouring banks.
template <int kPerThread>
__device__ __forceinline__ int TilePlace(int index, int threads, int i) {
  constexpr int kGroup = kPerThread < kQuad ? kPerThread : kQuad;
  return i / kGroup * (threads * kGroup) + index * kGroup + i % kGroup;
}

// The kPerThread floats of a row of shared memory that TilePlace gives to this thread.
template <int kPerThread>
__device__ __forceinline__ void ReadTileRow(float (&out)[kPerThread], const float* row, int index, int threads) {
  constexpr int kGroup = kPerThread < kQuad ? kPerThread : kQuad;
#pragma unroll
  for (int i = 0; i < kPerThread; i += kGroup) {
    const auto group = *reinterpret_cast<const Group<float, kGroup>*>(row + TilePlace<kPerThread>(index, threads, i));
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[i + j] = group.value[j];
  }
}

}  // namespace jax_blocksparse
