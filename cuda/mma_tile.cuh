// What the tensor-core kernels share: the layout of operand tiles in shared memory, and how they are filled.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace jax_blocksparse {

constexpr int kMmaThreads = 128;
constexpr int kMmaWarps = kMmaThreads / 32;
constexpr int kChunk = 8;  // elements of the 16 bytes that one copy or one row of an 8x8 matrix has

// The byte at which chunk `chunk` of row `row` lies in a tile with rows of kRow 16-bit elements.
//
// Chunks are permuted within their row so that eight chunks of the same number in eight successive rows (what one
// phase of ldmatrix reads) lie in different banks: the chunk number is XORed with the number of the row's 128-byte
// line. The pattern repeats every 8 rows, so a step of 16 rows adds a constant to the address, and a step to the next
// even chunk flips bits in it: see TileStep.
template <int kRow>
__device__ __forceinline__ constexpr std::uint32_t TileOffset(int row, int chunk) {
  static_assert(kRow == 8 || kRow == 16 || kRow == 32 || kRow == 64,
                "a row fills a 128-byte line, or a line holds whole rows");
  const int line = row / (64 / kRow);
  return row * (kRow * 2) + ((chunk ^ (line & (kRow / kChunk - 1))) * 16);
}

// From the offset of (row, chunk) with chunk 0 or 1 to that of (row + 16 * row16, chunk + 2 * chunk16).
template <int kRow>
__device__ __forceinline__ constexpr std::uint32_t TileStep(std::uint32_t offset, int row16, int chunk16) {
  return (offset ^ (chunk16 * 32)) + row16 * (16 * kRow * 2);
}

static_assert(TileStep<64>(TileOffset<64>(13, 1), 2, 3) == TileOffset<64>(45, 7));
static_assert(TileStep<32>(TileOffset<32>(13, 1), 1, 1) == TileOffset<32>(29, 3));
static_assert(TileStep<16>(TileOffset<16>(13, 1), 3, 0) == TileOffset<16>(61, 1));

// A lane's row and chunk within a 16x16 piece of a tile, for an ldmatrix whose four 8x8 matrices come in the order
// (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1): rows first ...
template <int kRow>
__device__ __forceinline__ std::uint32_t RowsFirstOffset(int lane) {
  return TileOffset<kRow>(lane % 16, lane / 16);
}

// ... or (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1): chunks first.
template <int kRow>
__device__ __forceinline__ std::uint32_t ChunksFirstOffset(int lane) {
  return TileOffset<kRow>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// How many of the eight elements that start at element `first` of `existing` exist.
__device__ __forceinline__ int ChunkElements(int existing, int first) { return max(0, min(existing - first, kChunk)); }

// Eight elements of which `valid` exist, from an address of any alignment, read one by one.
template <typename T>
__device__ __forceinline__ uint4 ReadUnaligned(const T* from, int valid) {
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from);
  std::uint32_t words[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const std::uint32_t low = 2 * i < valid ? __ldg(bits + 2 * i) : 0;
    const std::uint32_t high = 2 * i + 1 < valid ? __ldg(bits + 2 * i + 1) : 0;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// All threads together copy kRows x (8 * kRowChunks) elements of a row-major matrix to a tile with rows of kRow
// elements, from the chunk `first_chunk` of its rows on. Of the source `rows` rows and `width` elements a row exist;
// the rest becomes zeros. `aligned` says that each source row starts at a multiple of 16 bytes: then the copies run on,
// and WaitForCopies tells when they are done.
template <int kRow, int kRows, int kRowChunks, typename T>
__device__ __forceinline__ void LoadRows(std::uint32_t tile, int first_chunk, const T* from, std::int64_t pitch,
                                         int rows, int width, bool aligned) {
  static_assert(sizeof(T) == 2);
  constexpr int kChunks = kRows * kRowChunks;
  if (aligned) {
#pragma unroll
    for (int chunk = threadIdx.x; chunk < kChunks; chunk += kMmaThreads) {
      const int row = chunk / kRowChunks, c = chunk % kRowChunks;
      CopyAsync16(tile + TileOffset<kRow>(row, first_chunk + c), from + row * pitch + c * kChunk,
                  row < rows ? ChunkElements(width, c * kChunk) * 2 : 0);
    }
  } else {
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < kChunks; chunk += kMmaThreads) {
      const int row = chunk / kRowChunks, c = chunk % kRowChunks;
      StoreShared16(tile + TileOffset<kRow>(row, first_chunk + c),
                    ReadUnaligned(from + row * pitch + c * kChunk, row < rows ? ChunkElements(width, c * kChunk) : 0));
    }
  }
}

// Whether the rows of a matrix start at multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ bool HasAlignedRows(const T* matrix, std::int64_t pitch) {
  return pitch % kChunk == 0 && reinterpret_cast<std::uintptr_t>(matrix) % 16 == 0;
}

// Two neighbouring results, stored as two U.
__device__ __forceinline__ void StorePair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
__device__ __forceinline__ void StorePair(__nv_bfloat16* to, float first, float second) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
}
__device__ __forceinline__ void StorePair(__half* to, float first, float second) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
}

}  // namespace jax_blocksparse
