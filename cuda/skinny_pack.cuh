// For few tokens and blocks that are small beside their number: x with the pieces of all tokens that a unit of weights
// needs side by side. In x as it is they are 16 to 64 bytes at a time, of which L2 gives less than of whole lines.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "ptx.cuh"
#include "skinny_unit.cuh"

namespace jax_blocksparse {

struct PackXParams {
  const uint4* x;
  uint4* packed;
  std::int64_t x_batch_stride, batch_stride;  // in chunks of eight elements, as what follows
  std::int64_t token_stride, piece_stride;
  int row_chunks, piece_chunks;
};

// A chunk a thread; the grid has a row of CTAs for each token, and a layer for each batch element of x. Bound by the
// launch: x has a megabyte or two, and the product's launch overlaps with this one.
static __global__ void __launch_bounds__(256) PackXKernel(const __grid_constant__ PackXParams p) {
  LaunchDependents();
  const int chunk = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
  if (chunk >= p.row_chunks) return;
  const std::int64_t from = blockIdx.z * p.x_batch_stride + std::int64_t{token} * p.row_chunks + chunk;
  const std::int64_t to = blockIdx.z * p.batch_stride + chunk / p.piece_chunks * p.piece_stride +
                          token * p.token_stride + chunk % p.piece_chunks;
  p.packed[to] = p.x[from];
}

inline SkinnyX PackedX(const MatmulParams& p, const void* packed) {
  const std::int64_t piece = p.block < kUnitDepth ? p.block : kUnitDepth;
  return {packed, p.x_batch_stride == 0 ? 0 : p.tokens * PackedXFeatures(p), piece, p.tokens * piece, true};
}

inline cudaError_t LaunchPackX(const MatmulParams& p, const SkinnyX& to, void* packed, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int row_chunks = p.in_features / kChunk;
  const PackXParams params{static_cast<const uint4*>(p.x),
                           static_cast<uint4*>(packed),
                           p.x_batch_stride / kChunk,
                           to.batch_stride / kChunk,
                           to.token_stride / kChunk,
                           to.piece_stride / kChunk,
                           row_chunks,
                           static_cast<int>(to.token_stride / kChunk)};
  const dim3 grid(CeilDiv(row_chunks, kThreads), p.tokens, p.x_batch_stride == 0 ? 1 : p.batch);
  PackXKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_blocksparse
