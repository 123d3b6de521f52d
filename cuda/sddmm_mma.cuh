// The blocks of x^T dy on tensor cores by mma.sync, for 16-bit elements and blocks of 16 to 128.
//
// Large tiles: a CTA computes 128 / b blocks with successive ids, each a product over all tokens with its sums in
// registers. Their pieces of x and dy ("slabs": some tokens by b features) stream through shared memory by cp.async,
// two stages ahead. A slab that successive ids share is loaded once, so ids stored row by row or column by column read
// little more than half. Small tiles, for few blocks: a CTA has one block (a quarter of it at 128), and for blocks up
// to 32 the four warps take different tokens and add their sums at the end in a fixed order. Both operands are stored
// token by token, and both are needed the other way round: ldmatrix transposes them. What bounds it: bytes from L2
// into shared memory, b products a byte for unshared slabs; all CTAs pass through the tokens at about the same pace, so
// that memory is read once for each wave of CTAs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "mma_tile.cuh"

namespace jax_blocksparse {

template <int kBlock, TileSize kSize>
struct SddmmTile {
  static constexpr bool kLarge = kSize == TileSize::kLarge;
  static constexpr int kIds = SddmmTileIds(kSize, kBlock);
  static constexpr int kSide = kLarge ? kBlock : std::min(kBlock, 64);  // of the piece of a block that a CTA computes
  static constexpr int kPieces = kBlock / kSide * (kBlock / kSide);     // CTAs that share a block

  // How four warps share the CTA's work: tiles of kWarpRows x kWarpCols of kWarpIds blocks, every kSplit-th token step.
  static constexpr int kWarpRows = kLarge ? (kBlock == 128 ? 64 : std::min(kBlock, 32)) : std::min(kSide, 32);
  static constexpr int kWarpCols = kLarge ? std::min(kBlock, 64) : std::min(kSide, 32);
  static constexpr int kWarpIds = kLarge && kBlock == 16 ? 2 : 1;
  static constexpr int kRowTiles = kSide / kWarpRows;
  static constexpr int kColTiles = kSide / kWarpCols;
  static constexpr int kSplit = kMmaWarps / (kIds / kWarpIds * kRowTiles * kColTiles);
  static_assert(kPieces == SddmmTilesPerId(kSize, kBlock));
  static_assert(kIds / kWarpIds * kRowTiles * kColTiles * kSplit == kMmaWarps);

  static constexpr int kTokens = !kLarge && kBlock <= 32 ? 128 : 64;  // of one stage
  static constexpr int kStages = kLarge ? 3 : 4;
  static constexpr int kRow = std::min(kSide, 64);  // features of a slab
  static constexpr int kSlabsPerId = kSide / kRow;
  static constexpr int kSlabs = kIds * kSlabsPerId;
  static constexpr int kSlabBytes = kTokens * kRow * 2;
  static constexpr int kStageBytes = 2 * kSlabs * kSlabBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kTokens / 16 % kSplit == 0 && kTokens * (kRow / kChunk) % kMmaThreads == 0);
  static_assert(kWarpRows <= kRow && kWarpCols <= kRow, "a warp reads from one slab of each operand");
  static_assert(kSplit == 1 || kMmaWarps * kSide * kSide * int{sizeof(float)} <= kSharedBytes, "partial sums fit");
  static_assert(kSharedBytes <= 99 * 1024, "the largest that every architecture since sm_80 allows");
};

// Where a block is, in blocks; both -1 for an inert one and behind the last one.
struct BlockPlace {
  int row, col;

  __device__ BlockPlace(const SddmmParams& p, std::int64_t batch, int id) : row(-1), col(-1) {
    if (id >= p.nnz) return;
    const int r = __ldg(p.rows + batch * p.ids_batch_stride + id), c = __ldg(p.cols + batch * p.ids_batch_stride + id);
    if (r < 0 || c < 0 || r >= CeilDiv(p.in_features, p.block) || c >= CeilDiv(p.out_features, p.block)) return;
    row = r;
    col = c;
  }
};

// Bit i: the slab of block i is loaded, because block i - 1 does not have the same.
template <int kIds>
__device__ std::uint32_t SlabsToLoad(const int (&place)[kIds]) {
  std::uint32_t slabs = 0;
#pragma unroll
  for (int i = 0; i < kIds; ++i) {
    if (place[i] >= 0 && (i == 0 || place[i] != place[std::max(i - 1, 0)])) slabs |= 1u << i;
  }
  return slabs;
}

// The block whose slab block i uses: the last one up to i that is loaded (any, for an inert block).
__device__ __forceinline__ int SlabOf(std::uint32_t slabs, int i) {
  return max(0, 31 - __clz(slabs & ((2u << i) - 1)));
}

// What exists of `features` features from feature `first` of block `place` on; not positive when nothing does.
__device__ __forceinline__ int Existing(int features, int place, int block, int first) {
  const std::int64_t start = static_cast<std::int64_t>(place) * block + first;
  return static_cast<int>(max(features - start, std::int64_t{-1}));
}

template <typename T, int kBlock, TileSize kSize>
__global__ void __launch_bounds__(kMmaThreads, 2) SddmmMmaKernel(const __grid_constant__ SddmmParams p) {
  using Tile = SddmmTile<kBlock, kSize>;
  constexpr int kIds = Tile::kIds;
  extern __shared__ __align__(128) unsigned char shared[];

  const std::int64_t groups = CeilDiv(p.nnz, kIds);
  const int piece = static_cast<int>(blockIdx.x % Tile::kPieces);
  const std::int64_t batch = blockIdx.x / Tile::kPieces / groups;
  const int first_id = static_cast<int>(blockIdx.x / Tile::kPieces % groups) * kIds;
  const int piece_row = piece / (kBlock / Tile::kSide) * Tile::kSide;
  const int piece_col = piece % (kBlock / Tile::kSide) * Tile::kSide;

  int rows[kIds], cols[kIds];
#pragma unroll
  for (int i = 0; i < kIds; ++i) {
    const BlockPlace place(p, batch, first_id + i);
    rows[i] = place.row;
    cols[i] = place.col;
  }
  const std::uint32_t x_slabs = SlabsToLoad(rows), dy_slabs = SlabsToLoad(cols);
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const T* dy = static_cast<const T*>(p.dy) + batch * p.dy_batch_stride;
  const bool x_aligned = HasAlignedRows(x, p.in_features), dy_aligned = HasAlignedRows(dy, p.out_features);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t stages = SharedAddress(shared);
  const std::int64_t steps = x_slabs == 0 ? 0 : CeilDiv(p.tokens, Tile::kTokens);

  const auto load_slabs = [&](std::uint32_t to, std::uint32_t slabs, const T* operand, int features, bool aligned,
                              const int (&place)[kIds], int first_feature, std::int64_t first_token) {
    const int tokens = static_cast<int>(min(p.tokens - first_token, std::int64_t{Tile::kTokens}));
    operand += first_token * features + first_feature;
#pragma unroll
    for (int i = 0; i < kIds; ++i) {
      if ((slabs >> i & 1) == 0) continue;
      const T* block = operand + static_cast<std::int64_t>(place[i]) * kBlock;
      const int existing = Existing(features, place[i], kBlock, first_feature);
#pragma unroll
      for (int panel = 0; panel < Tile::kSlabsPerId; ++panel) {
        LoadRows<Tile::kRow, Tile::kTokens, Tile::kRow / kChunk>(
            to + (i * Tile::kSlabsPerId + panel) * Tile::kSlabBytes, 0, block + panel * Tile::kRow, features, tokens,
            existing - panel * Tile::kRow, aligned);
      }
    }
  };
  const auto load_stage = [&](std::int64_t step) {
    if (step < steps) {
      const std::uint32_t to = stages + static_cast<int>(step % Tile::kStages) * Tile::kStageBytes;
      load_slabs(to, x_slabs, x, p.in_features, x_aligned, rows, piece_row, step * Tile::kTokens);
      load_slabs(to + Tile::kSlabs * Tile::kSlabBytes, dy_slabs, dy, p.out_features, dy_aligned, cols, piece_col,
                 step * Tile::kTokens);
    }
    CommitCopies();
  };

  // This warp's share.
  const int split = warp % Tile::kSplit;
  const int tile = warp / Tile::kSplit;
  const int warp_col = tile % Tile::kColTiles * Tile::kWarpCols;
  const int warp_row = tile / Tile::kColTiles % Tile::kRowTiles * Tile::kWarpRows;
  const int warp_id = tile / (Tile::kColTiles * Tile::kRowTiles) * Tile::kWarpIds;
  const std::uint32_t x_lane = ChunksFirstOffset<Tile::kRow>(lane);
  const std::uint32_t dy_lane = RowsFirstOffset<Tile::kRow>(lane);
  std::uint32_t x_slab[Tile::kWarpIds], dy_slab[Tile::kWarpIds];
#pragma unroll
  for (int i = 0; i < Tile::kWarpIds; ++i) {
    x_slab[i] = (SlabOf(x_slabs, warp_id + i) * Tile::kSlabsPerId + warp_row / Tile::kRow) * Tile::kSlabBytes;
    dy_slab[i] =
        (Tile::kSlabs + SlabOf(dy_slabs, warp_id + i) * Tile::kSlabsPerId + warp_col / Tile::kRow) * Tile::kSlabBytes;
  }

  constexpr int kRowSteps = Tile::kWarpRows / 16, kColSteps = Tile::kWarpCols / 16;
  float sums[Tile::kWarpIds][kRowSteps][2 * kColSteps][4] = {};
  const auto multiply_stage = [&](int stage) {
    const std::uint32_t base = stages + stage * Tile::kStageBytes;
#pragma unroll
    for (int step = 0; step < Tile::kTokens / 16 / Tile::kSplit; ++step) {
      const int token16 = step * Tile::kSplit + split;
#pragma unroll
      for (int i = 0; i < Tile::kWarpIds; ++i) {
        std::uint32_t a[kRowSteps][4];
#pragma unroll
        for (int m = 0; m < kRowSteps; ++m) {
          LoadMatrices<true>(a[m],
                             base + x_slab[i] + TileStep<Tile::kRow>(x_lane, token16, warp_row % Tile::kRow / 16 + m));
        }
#pragma unroll
        for (int n = 0; n < kColSteps; ++n) {
          std::uint32_t b[4];
          LoadMatrices<true>(
              b, base + dy_slab[i] + TileStep<Tile::kRow>(dy_lane, token16, warp_col % Tile::kRow / 16 + n));
#pragma unroll
          for (int m = 0; m < kRowSteps; ++m) {
            MultiplyAdd<T>(sums[i][m][2 * n], a[m], b[0], b[1]);
            MultiplyAdd<T>(sums[i][m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  };

  // The first rounds only load; in each later one, a stage is loaded while the oldest one is multiplied.
  for (std::int64_t step = 1 - Tile::kStages; step < steps; ++step) {
    if (step >= 0) {
      WaitForCopies<Tile::kStages - 2>();
      __syncthreads();  // everyone's copies of this stage have landed, and everyone is done with the one before
    }
    load_stage(step + Tile::kStages - 1);
    if (step >= 0) multiply_stage(static_cast<int>(step % Tile::kStages));
  }

  if constexpr (Tile::kSplit > 1) {  // all warps have the same block; add up in warp order
    static_assert(Tile::kSplit == kMmaWarps && Tile::kWarpIds == 1);
    constexpr int kSums = kRowSteps * 2 * kColSteps * 4;  // of one thread
    float* partial = reinterpret_cast<float*>(shared);
    WaitForCopies<0>();
    __syncthreads();
    float* flat = &sums[0][0][0][0];
#pragma unroll
    for (int i = 0; i < kSums; ++i) partial[(warp * kSums + i) * 32 + lane] = flat[i];
    __syncthreads();
    if (warp != 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      for (int w = 1; w < kMmaWarps; ++w) flat[i] += partial[(w * kSums + i) * 32 + lane];
    }
  }

  const auto write = [&](auto* data) {
#pragma unroll
    for (int i = 0; i < Tile::kWarpIds; ++i) {
      const std::int64_t id = first_id + warp_id + i;
      if (id >= p.nnz) return;
      const BlockPlace place(p, batch, static_cast<int>(id));
      const int x_features = place.row < 0 ? 0 : Existing(p.in_features, place.row, kBlock, piece_row + warp_row);
      const int dy_features = place.col < 0 ? 0 : Existing(p.out_features, place.col, kBlock, piece_col + warp_col);
      auto* block =
          data + (batch * p.nnz + id) * (kBlock * kBlock) + (piece_row + warp_row) * kBlock + piece_col + warp_col;
#pragma unroll
      for (int m = 0; m < kRowSteps; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * kColSteps; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8 + lane / 4, col = n * 8 + lane % 4 * 2;
            const float* sum = sums[i][m][n] + 2 * half;
            StorePair(block + row * kBlock + col, row < x_features && col < dy_features ? sum[0] : 0.0f,
                      row < x_features && col + 1 < dy_features ? sum[1] : 0.0f);
          }
        }
      }
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.data));
  } else {
    write(static_cast<T*>(p.data));
  }
}

template <typename T, int kBlock>
cudaError_t LaunchSddmmBlock(const SddmmParams& params, TileSize size, cudaStream_t stream) {
  const std::int64_t ctas = SddmmMmaCtas(params, size);
  if (size == TileSize::kLarge) {
    return Launch<SddmmMmaKernel<T, kBlock, TileSize::kLarge>>(
        params, ctas, kMmaThreads, SddmmTile<kBlock, TileSize::kLarge>::kSharedBytes, stream);
  }
  return Launch<SddmmMmaKernel<T, kBlock, TileSize::kSmall>>(params, ctas, kMmaThreads,
                                                             SddmmTile<kBlock, TileSize::kSmall>::kSharedBytes, stream);
}

// One source file for each element type instantiates this.
template <typename T>
cudaError_t LaunchSddmmMmaOf(const SddmmParams& params, TileSize size, cudaStream_t stream) {
  switch (params.block) {
    case 16:
      return LaunchSddmmBlock<T, 16>(params, size, stream);
    case 32:
      return LaunchSddmmBlock<T, 32>(params, size, stream);
    case 64:
      return LaunchSddmmBlock<T, 64>(params, size, stream);
    case 128:
      return LaunchSddmmBlock<T, 128>(params, size, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
