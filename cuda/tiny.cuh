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

// The rows of x or dy, in chunks. In shared memory they begin an odd number of chunks apart, for ldmatrix.
struct TinyRows {
  std::uint32_t chunks, divisor;  // 2^32 through their number if that is even

  TinyRows() = default;
  // The divisor is rounded up, which is right for as many chunks as shared memory has room for.
  explicit TinyRows(std::int32_t features)
      : chunks(features / kChunk),
        divisor(chunks % 2 != 0 ? 0 : std::numeric_limits<std::uint32_t>::max() / std::max(1u, chunks) + 1) {}

  __host__ __device__ std::uint32_t Pitch() const { return (chunks | 1) * kChunkBytes; }

  // All threads copy `wanted` rows, of which `existing` exist; the others become zeros.
  __device__ __forceinline__ void Copy(std::uint32_t to, const void* from, std::uint32_t existing,
                                       std::uint32_t wanted) const {
#pragma unroll 1
    for (std::uint32_t i = threadIdx.x; i < wanted * chunks; i += kTinyThreads) {
      const bool exists = i < existing * chunks;
      CopyAsync16(to + (i + __umulhi(i, divisor)) * kChunkBytes, static_cast<const uint4*>(from) + (exists ? i : 0),
                  exists ? kChunkBytes : 0);
    }
  }
};

}  // namespace jax_blocksparse
