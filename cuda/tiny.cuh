// What the kernels for tiny products share: they hold whole operands in shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels.h"
#include "mma_tile.cuh"

namespace jax_blocksparse {

constexpr int kTinyThreads = 256;
constexpr int kTinyMaxCtas = 128;            // each of them reads all; more would not run at once
constexpr int kTinySharedBytes = 48 * 1024;  // more must be asked for
constexpr int kChunkBytes = kChunk * 2;

// Calls a function for this thread's share of 0, 1, ..., count - 1. Apart from the first, which is all of most calls
// and must not wait for a branch.
template <typename Function>
__device__ __forceinline__ void ForShare(std::uint32_t count, const Function& function) {
  if (threadIdx.x < count) function(threadIdx.x);
}
template <typename Function>
__device__ __forceinline__ void ForRestOfShare(std::uint32_t count, const Function& function) {
#pragma unroll 1
  for (std::uint32_t i = threadIdx.x + kTinyThreads; i < count; i += kTinyThreads) function(i);
}

// The rows of x or dy, in chunks. In shared memory they begin an odd number of chunks apart, for ldmatrix.
struct TinyRows {
  std::uint32_t chunks, divisor;  // 2^32 through their number if that is even

  TinyRows() = default;
  // The divisor is rounded up, which is right for as many chunks as shared memory has room for.
  explicit TinyRows(std::int32_t features)
      : chunks(features / kChunk),
        divisor(chunks % 2 != 0 ? 0 : std::numeric_limits<std::uint32_t>::max() / std::max(1u, chunks) + 1) {}

  __host__ __device__ std::uint32_t Pitch() const { return (chunks | 1) * kChunkBytes; }

  // Copies a chunk of the first rows, of which `existing` exist; if it belongs to none of them, it becomes zeros.
  __device__ __forceinline__ void CopyChunk(std::uint32_t to, const void* from, std::uint32_t existing,
                                            std::uint32_t chunk) const {
    const bool exists = chunk < existing * chunks;
    CopyAsync16(to + (chunk + __umulhi(chunk, divisor)) * kChunkBytes,
                static_cast<const uint4*>(from) + (exists ? chunk : 0), exists ? kChunkBytes : 0);
  }
};

}  // namespace jax_blocksparse
