// y = x W and dx = dy W^T on tensor cores by mma.sync, for 16-bit elements and blocks of 16 to 128.
//
// A CTA computes a tile of tokens x features, the features being one block column of 128 or several smaller ones. It
// walks the union of its columns' lists (ColumnWalk), so one piece of x serves every column that has a block in that
// block row. Copies (cp.async) run two or more stages ahead of the products; a stage is always 64 deep: half a block of
// 128, one of 64, two of 32, four of 16. Absent blocks are neither loaded nor multiplied: a bit mask travels with each
// stage, and a warp skips what is absent without diverging. Warps split the tokens, so that all of them have the same
// work whatever the pattern; only single blocks of 128 are split over both. W is read in the order it is stored:
// ldmatrix transposes it for x W and takes it as it is for dy W^T. What bounds it: bytes from L2 into shared memory (an
// x piece of width b brings b products a byte, times the columns that share it) for small or few blocks; the issue
// rate of ldmatrix and mma.sync, about 60 % of a Hopper's tensor throughput, for blocks of 128.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "column_walk.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma_tile.cuh"

namespace jax_blocksparse {

constexpr int kStageDepth = 64;

template <int kBlock, TileSize kSize>
struct MatmulTile {
  static constexpr bool kLarge = kSize == TileSize::kLarge;
  static constexpr int kTokens = MatmulTileTokens(kSize);
  static constexpr int kFeatures = MatmulTileFeatures(kSize, kBlock);
  static constexpr int kColumns = kFeatures / kBlock;
  // A sub-step is what one step of the walk (or half of it) adds to a stage.
  static constexpr int kSubDepth = std::min(kBlock, kStageDepth);
  static constexpr int kSubSteps = kStageDepth / kSubDepth;
  static constexpr int kParts = kBlock / kSubDepth;  // sub-steps of one block

  static constexpr int kTokenWarps = kLarge ? (kBlock == 128 ? 2 : 4) : 1;
  static constexpr int kFeatureWarps = kMmaWarps / kTokenWarps;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpFeatures = kFeatures / kFeatureWarps;
  static constexpr int kWarpColumnWidth = std::min(kWarpFeatures, kBlock);  // of one column, what a warp computes
  static constexpr int kWarpColumns = kWarpFeatures / kWarpColumnWidth;
  static constexpr int kTokenSteps = kWarpTokens / 16;
  static constexpr int kDepthSteps = kSubDepth / 16;
  // Depth steps for which a warp holds x in registers at once: all of them when columns share x, else one.
  static constexpr int kHeldSteps = kWarpColumns == 1 && kBlock == 128 ? 1 : kDepthSteps;

  static constexpr int kXBytes = kTokens * kStageDepth * 2;
  static constexpr int kBlockBytes = kSubDepth * kBlock * 2;
  static constexpr int kStageBytes = kXBytes + kSubSteps * kColumns * kBlockBytes;
  static constexpr int kStages = kLarge ? 3 : kBlock == 128 ? 4 : 6;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kOutputPitch = kFeatures + 8;  // elements; keeps the epilogue free of bank conflicts

  static_assert(kTokens % (16 * kTokenWarps) == 0 && kWarpFeatures % 16 == 0 && kBlock % kWarpColumnWidth == 0);
  static_assert(kSubSteps * kColumns <= 32, "a stage's blocks are the bits of one word");
  static_assert(kXBytes % 128 == 0 && kBlockBytes % 128 == 0, "bank conflicts are avoided within aligned pieces");
  static_assert(kTokens * kOutputPitch * int{sizeof(float)} <= kSharedBytes, "the epilogue reuses the stages");
  static_assert(kSharedBytes + 128 <= 99 * 1024, "the largest that every architecture since sm_80 allows");
};

// How a block, or half a block of 128, lies in shared memory: rows of up to 64 elements as they are stored, and for
// x W a block of 128 as two panels of 64 features.
template <int kBlock, int kSubDepth, bool kTranspose>
struct BlockLayout {
  static constexpr int kRow = kTranspose ? kSubDepth : std::min(kBlock, 64);
  static constexpr int kPanelBytes = kSubDepth * kRow * 2;  // only x W has more than one panel
  static constexpr int kChunks = kSubDepth * kBlock / kChunk;

  // This lane's offset within a 16x16 piece, for fragments in the order (depth 0-7, features 0-7), (depth 8-15,
  // features 0-7), (depth 0-7, features 8-15), (depth 8-15, features 8-15).
  static __device__ std::uint32_t LaneOffset(int lane) {
    return kTranspose ? ChunksFirstOffset<kRow>(lane) : RowsFirstOffset<kRow>(lane);
  }

  // The same lane's offset in another 16x16 piece of the block.
  static __device__ std::uint32_t PieceOffset(std::uint32_t lane_offset, int depth16, int feature16) {
    if constexpr (kTranspose) return TileStep<kRow>(lane_offset, feature16, depth16);
    constexpr int kPieces = kRow / 16;
    return TileStep<kRow>(lane_offset, depth16, feature16 % kPieces) + feature16 / kPieces * kPanelBytes;
  }

  // Loads chunk `chunk` of the block part that starts `first_depth` into the block and of which `depth` exist.
  template <typename T>
  static __device__ void Load(std::uint32_t to, const T* block, int chunk, int first_depth, int depth) {
    if constexpr (kTranspose) {
      const int feature = chunk / (kRow / kChunk), k = chunk % (kRow / kChunk) * kChunk;
      CopyAsync16(to + TileOffset<kRow>(feature, k / kChunk), block + feature * kBlock + first_depth + k,
                  ChunkElements(depth, k) * 2);
    } else {
      constexpr int kRowChunks = kBlock / kChunk, kPanelChunks = kRow / kChunk;
      const int k = chunk / kRowChunks, feature_chunk = chunk % kRowChunks;
      CopyAsync16(to + TileOffset<kRow>(k, feature_chunk % kPanelChunks) + feature_chunk / kPanelChunks * kPanelBytes,
                  block + (first_depth + k) * kBlock + feature_chunk * kChunk, k < depth ? 16 : 0);
    }
  }
};

// Which tile of y a CTA computes. Eight token tiles by all feature tiles go first, then the next eight: what runs at
// the same time shares both x and W in L2.
struct TilePosition {
  std::int64_t batch, token_tile, feature_tile;

  __device__ TilePosition(std::int64_t index, std::int64_t token_tiles, std::int64_t feature_tiles) {
    constexpr int kBand = 8;
    batch = index / (token_tiles * feature_tiles);
    index %= token_tiles * feature_tiles;
    const std::int64_t first = index / (kBand * feature_tiles) * kBand;
    const std::int64_t height = min(static_cast<std::int64_t>(kBand), token_tiles - first);
    index -= first * feature_tiles;
    token_tile = first + index % height;
    feature_tile = index / height;
  }
};

// Writes a tile of y from shared memory, in 16-byte pieces where y allows it.
template <typename U, int kFeatures, int kPitch>
__device__ void WriteTile(U* y, std::int64_t pitch, const U* tile, int tokens, int features) {
  constexpr int kPiece = 16 / sizeof(U);
  const bool aligned = pitch % kPiece == 0 && reinterpret_cast<std::uintptr_t>(y) % 16 == 0;
  for (int piece = threadIdx.x; piece < tokens * (kFeatures / kPiece); piece += kMmaThreads) {
    const int token = piece / (kFeatures / kPiece), feature = piece % (kFeatures / kPiece) * kPiece;
    const U* from = tile + token * kPitch + feature;
    U* to = y + token * pitch + feature;
    if (aligned && feature + kPiece <= features) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < kPiece && feature + i < features; ++i) to[i] = from[i];
    }
  }
}

template <typename T, int kBlock, bool kTranspose, TileSize kSize>
__global__ void __launch_bounds__(kMmaThreads, 2) MatmulMmaKernel(const __grid_constant__ MatmulParams p) {
  using Tile = MatmulTile<kBlock, kSize>;
  using Block = BlockLayout<kBlock, Tile::kSubDepth, kTranspose>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::uint32_t stage_blocks[Tile::kStages];

  const TilePosition at(blockIdx.x, CeilDiv(p.tokens, Tile::kTokens), CeilDiv(p.out_features, Tile::kFeatures));
  const std::int64_t first_token = at.token_tile * Tile::kTokens;
  const std::int64_t first_feature = at.feature_tile * Tile::kFeatures;
  const int tokens = static_cast<int>(min(p.tokens - first_token, static_cast<std::int64_t>(Tile::kTokens)));
  const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + first_token * p.in_features;
  const T* data = static_cast<const T*>(p.data) + at.batch * p.data_batch_stride;
  const bool x_aligned = HasAlignedRows(x, p.in_features);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::uint32_t stages = SharedAddress(shared);

  ColumnWalk<Tile::kColumns> walk(p, at.batch, first_feature / kBlock);
  typename ColumnWalk<Tile::kColumns>::Step step;
  int part = 0;  // of a block of 128

  // Fills a stage with as many sub-steps as it holds; a stage without a block says that the lists are used up.
  const auto load_stage = [&](int stage) {
    const std::uint32_t x_tile = stages + stage * Tile::kStageBytes;
    std::uint32_t blocks = 0;
#pragma unroll
    for (int sub = 0; sub < Tile::kSubSteps; ++sub) {
      if (part == 0) step = walk.Next();
      if (step.row == walk.kEnd) break;
      const int first_depth = part * Tile::kSubDepth;
      const std::int64_t first_in = static_cast<std::int64_t>(step.row) * kBlock + first_depth;
      const int depth = static_cast<int>(min(p.in_features - first_in, static_cast<std::int64_t>(Tile::kSubDepth)));

      constexpr int kRowChunks = Tile::kSubDepth / kChunk;
      LoadRows<kStageDepth, Tile::kTokens, kRowChunks>(x_tile, sub * kRowChunks, x + first_in, p.in_features, tokens,
                                                       depth, x_aligned);
      static_assert(Block::kChunks % 32 == 0 && Tile::kColumns * Block::kChunks % kMmaThreads == 0,
                    "all lanes of a warp load from the same block, and none is left out of the shuffle");
#pragma unroll
      for (int chunk = thread; chunk < Tile::kColumns * Block::kChunks; chunk += kMmaThreads) {
        const int column = chunk / Block::kChunks;
        const std::int64_t id = __shfl_sync(0xffffffffu, step.id, column);
        if (step.columns >> column & 1) {
          Block::Load(x_tile + Tile::kXBytes + (sub * Tile::kColumns + column) * Tile::kBlockBytes,
                      data + id * (kBlock * kBlock), chunk % Block::kChunks, first_depth, depth);
        }
      }
      blocks |= step.columns << (sub * Tile::kColumns);
      part = (part + 1) % Tile::kParts;
    }
    if (thread == 0) stage_blocks[stage] = blocks;
    CommitCopies();
  };

  const int warp_token = warp / Tile::kFeatureWarps * Tile::kWarpTokens;
  const int warp_feature = warp % Tile::kFeatureWarps * Tile::kWarpFeatures;
  const std::uint32_t x_lane = RowsFirstOffset<kStageDepth>(lane);
  const std::uint32_t block_lane = Block::LaneOffset(lane);
  float sums[Tile::kTokenSteps][Tile::kWarpFeatures / 8][4] = {};

  const auto multiply_stage = [&](int stage, std::uint32_t blocks) {
    const std::uint32_t x_tile = stages + stage * Tile::kStageBytes;
#pragma unroll
    for (int sub = 0; sub < Tile::kSubSteps; ++sub) {
      constexpr std::uint32_t kColumnMask = (1u << Tile::kColumns) - 1;
      const std::uint32_t columns = blocks >> (sub * Tile::kColumns) & kColumnMask;
      if (columns == 0) break;
#pragma unroll
      for (int held = 0; held < Tile::kDepthSteps; held += Tile::kHeldSteps) {
        std::uint32_t a[Tile::kHeldSteps][Tile::kTokenSteps][4];
#pragma unroll
        for (int k = 0; k < Tile::kHeldSteps; ++k) {
#pragma unroll
          for (int m = 0; m < Tile::kTokenSteps; ++m) {
            LoadMatrices<false>(a[k][m], x_tile + TileStep<kStageDepth>(x_lane, warp_token / 16 + m,
                                                                        sub * Tile::kDepthSteps + held + k));
          }
        }
#pragma unroll
        for (int c = 0; c < Tile::kWarpColumns; ++c) {
          const int column = warp_feature / kBlock + c;
          if ((columns >> column & 1) == 0) continue;
          const std::uint32_t block = x_tile + Tile::kXBytes + (sub * Tile::kColumns + column) * Tile::kBlockBytes;
#pragma unroll
          for (int k = 0; k < Tile::kHeldSteps; ++k) {
#pragma unroll
            for (int n = 0; n < Tile::kWarpColumnWidth / 16; ++n) {
              std::uint32_t b[4];
              LoadMatrices<!kTranspose>(
                  b, block + Block::PieceOffset(block_lane, held + k, warp_feature % kBlock / 16 + n));
              const int n8 = c * (Tile::kWarpColumnWidth / 8) + 2 * n;
#pragma unroll
              for (int m = 0; m < Tile::kTokenSteps; ++m) {
                MultiplyAdd<T>(sums[m][n8], a[k][m], b[0], b[1]);
                MultiplyAdd<T>(sums[m][n8 + 1], a[k][m], b[2], b[3]);
              }
            }
          }
        }
      }
    }
  };

  // The first rounds only load; in each later one, a stage is loaded while the oldest one is multiplied.
  int loaded = 0, stage = 0;
  while (true) {
    std::uint32_t blocks = 0;
    if (loaded >= Tile::kStages - 1) {
      WaitForCopies<Tile::kStages - 2>();
      __syncthreads();  // everyone's copies of this stage have landed, and everyone is done with the one before
      blocks = stage_blocks[stage];
      if (blocks == 0) break;
    }
    load_stage(loaded % Tile::kStages);
    ++loaded;
    if (blocks != 0) {
      multiply_stage(stage, blocks);
      stage = (stage + 1) % Tile::kStages;
    }
  }

  const auto write = [&](auto* y) {
    using U = std::remove_pointer_t<decltype(y)>;
    U* tile = reinterpret_cast<U*>(shared);
#pragma unroll
    for (int m = 0; m < Tile::kTokenSteps; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpFeatures / 8; ++n) {
        U* to = tile + (warp_token + m * 16 + lane / 4) * Tile::kOutputPitch + warp_feature + n * 8 + lane % 4 * 2;
        StorePair(to, sums[m][n][0], sums[m][n][1]);
        StorePair(to + 8 * Tile::kOutputPitch, sums[m][n][2], sums[m][n][3]);
      }
    }
    __syncthreads();
    y += (at.batch * p.tokens + first_token) * p.out_features + first_feature;
    const int features =
        static_cast<int>(min(p.out_features - first_feature, static_cast<std::int64_t>(Tile::kFeatures)));
    WriteTile<U, Tile::kFeatures, Tile::kOutputPitch>(y, p.out_features, tile, tokens, features);
  };
  WaitForCopies<0>();
  __syncthreads();  // the stages are free
  if (p.f32_output) {
    write(static_cast<float*>(p.y));
  } else {
    write(static_cast<T*>(p.y));
  }
}

template <typename T, int kBlock, bool kTranspose, TileSize kSize>
cudaError_t LaunchTile(const MatmulParams& params, cudaStream_t stream) {
  return Launch<MatmulMmaKernel<T, kBlock, kTranspose, kSize>>(params, MatmulMmaCtas(params, kSize), kMmaThreads,
                                                               MatmulTile<kBlock, kSize>::kSharedBytes, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchBlock(const MatmulParams& params, TileSize size, cudaStream_t stream) {
  if (size == TileSize::kLarge) {
    return params.transpose ? LaunchTile<T, kBlock, true, TileSize::kLarge>(params, stream)
                            : LaunchTile<T, kBlock, false, TileSize::kLarge>(params, stream);
  }
  return params.transpose ? LaunchTile<T, kBlock, true, TileSize::kSmall>(params, stream)
                          : LaunchTile<T, kBlock, false, TileSize::kSmall>(params, stream);
}

// One source file for each element type instantiates this.
template <typename T>
cudaError_t LaunchMatmulMmaOf(const MatmulParams& params, TileSize size, cudaStream_t stream) {
  switch (params.block) {
    case 16:
      return LaunchBlock<T, 16>(params, size, stream);
    case 32:
      return LaunchBlock<T, 32>(params, size, stream);
    case 64:
      return LaunchBlock<T, 64>(params, size, stream);
    case 128:
      return LaunchBlock<T, 128>(params, size, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
