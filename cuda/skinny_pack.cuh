// For few tokens and blocks that are small beside their number: x in the order in which lanes hold it as right operands
// of products, the pieces of all tokens that go with the same rows of blocks together.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "mma_tile.cuh"

namespace jax_blocksparse {

// A piece of packed x, as deep as a block or 32. Of each tile of eight tokens a lane has a word, two elements, for each
// chunk of eight depths. Words of a lane come `kWords` at a time, and behind them those of the next lane.
template <typename Tile>
struct PackedPiece {
  static constexpr int kChunks = Tile::kPiece / kChunk;
  static constexpr int kLaneWords = Tile::kTokenTiles * kChunks;
  static constexpr int kWords = kLaneWords < 4 ? kLaneWords : 4;  // that a lane loads at once
  static constexpr int kLoads = kLaneWords / kWords;
  static_assert(kWords % 2 == 0 && kLoads * kWords == kLaneWords);
};

struct PackXParams {
  const std::uint32_t* x;
  uint2* packed;
  std::int64_t x_batch_stride, batch_stride;  // in words, in pairs
  int tokens, in_features, pairs;
};

// Two words a thread, and a row of CTAs for each batch element of x. What does not exist becomes zeros. Bound by the
// launch: x has a megabyte or two, and the product's launch overlaps with this one.
template <typename Tile>
__global__ void __launch_bounds__(256) PackXKernel(const __grid_constant__ PackXParams p) {
  using Packed = PackedPiece<Tile>;
  constexpr int kPairs = Packed::kWords / 2;
  LaunchDependents();
  const int pair = blockIdx.x * blockDim.x + threadIdx.x;
  if (pair >= p.pairs) return;
  const int lane = pair / kPairs % 32, load = pair / (32 * kPairs) % Packed::kLoads;
  const int piece = pair / (32 * kPairs * Packed::kLoads);
  std::uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int word = load * Packed::kWords + pair % kPairs * 2 + i;
    const int token = word / Packed::kChunks * 8 + lane / 4;
    const int depth = piece * Tile::kPiece + word % Packed::kChunks * kChunk + lane % 4 * 2;
    const std::uint32_t* const from =
        p.x + blockIdx.y * p.x_batch_stride + (std::int64_t{token} * p.in_features + depth) / 2;
    words[i] = token < p.tokens && depth < p.in_features ? *from : 0;
  }
  p.packed[blockIdx.y * p.batch_stride + pair] = make_uint2(words[0], words[1]);
}

template <typename Tile>
cudaError_t LaunchPackX(const MatmulParams& p, void* packed, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int pairs = CeilDiv(p.in_features, Tile::kPiece) * (Tile::kPiece * Tile::kTokens / 4);
  const PackXParams params{static_cast<const std::uint32_t*>(p.x),
                           static_cast<uint2*>(packed),
                           p.x_batch_stride / 2,
                           PackedXElements(p) / 4,
                           static_cast<int>(p.tokens),
                           p.in_features,
                           pairs};
  const dim3 grid(CeilDiv(pairs, kThreads), p.x_batch_stride == 0 ? 1 : p.batch);
  PackXKernel<Tile><<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_blocksparse
