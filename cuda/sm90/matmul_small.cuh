// y = x W for blocks of 8, 16 and 32 on Hopper.
//
// A CTA computes a tile of tokens x features. One warp copies, for each step of the tile's list, a chunk of x (tokens x
// 64 depths) and all blocks of W that meet it, which the plan has put next to each other, into a ring of stages. The
// roles are swapped: 64 features ("a group") are the instruction's M, tokens its N. A warpgroup gathers the 64 x 16
// piece of W^T that a product takes as A from the blocks that are there, into registers, by transposing ldmatrix; what
// is absent is read from a row of zeros. A piece without any block costs no product. So the tensor cores see the union
// of a group's columns, and a chunk of x is copied once for the union of the tile's columns. The next step's A is
// gathered while the last step's products run. CTAs are persistent, so that copies of the next tile run while y is
// written. What bounds it: the tensor cores at high density (at 16 x 16 and density .5, 94 % of the dense products
// remain), else filling shared memory from L2 and the warpgroups' latency from one step to the next.
#pragma once

#include "matmul_common.cuh"

namespace jax_blocksparse::sm90 {

constexpr int kProducers = PW;

template <int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups, int kStepUnits>
struct SmallTile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kFeatures = kTileFeatures;
  static constexpr int kWarpgroups = kNumWarpgroups;
  static constexpr int kGroups = kFeatures / kGroup;
  // Warpgroups share the groups; if there are more of them than groups, they share the tokens as well.
  static constexpr int kOwnGroups = std::max(1, kGroups / kWarpgroups);
  static constexpr int kParts = std::max(1, kWarpgroups / kGroups);
  static constexpr int kOwnTokens = kTokens / kParts;
  // In how many parts a step's A is gathered and multiplied: registers hold two parts besides the sums.
  static constexpr int kUnits = kStepUnits;
  static constexpr int kUnitDepths = kChunk / 16 / kUnits;
  static constexpr int kRun = std::max(1, kBlock / 16);  // products along a block's depth
  static constexpr int kThreads = kWarpgroups * 128 + kProducerThreads;
  static constexpr int kSliceFeatures = SliceFeatures(kBlock);
  static constexpr int kSlices = kFeatures / kSliceFeatures;
  static constexpr int kBlockBytes = kBlock * kBlock * 2;
  static constexpr int kXBytes = kTokens * kChunkBytes;
  static constexpr int kBuffers = kOwnGroups > 1 ? 2 : 1;
  static constexpr int kOutputBytes = kWarpgroups * kBuffers * kPieceBytes;
  static constexpr int kFullCapacity = kFeatures * kChunk / (kBlock * kBlock);
  static constexpr int kMinCapacity = kSliceFeatures * kChunk / (kBlock * kBlock);  // what a word can name
  static_assert(kBlock == 8 || kBlock == 16 || kBlock == 32);
  static_assert(kGroups * kParts == kOwnGroups * kWarpgroups && kFeatures % kGroup == 0, "the work is split evenly");
  static_assert(kOwnTokens == 128 || kOwnTokens == 256, "there are products for these widths");
  static_assert(kOwnGroups * kOwnTokens <= 256, "the sums fit into registers");
  static_assert(kUnitDepths % kRun == 0, "a part of a step has whole blocks");
  static_assert(kTokens <= 256, "one box of a tensor copy");
  static_assert(kFullCapacity <= 256, "eight bits of a mask's first position");

  static constexpr int StageBytes(int capacity) {
    return kXBytes + (capacity * kBlockBytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

// A word of the plan's masks, for one slice (16 features, or 32 for blocks of 32) and one step.
//   bits 0-15: the blocks present, by row of the chunk and, for blocks of 8, column of the slice
//   bits 16-19: for each 16 depths, whether the slice's group of 64 features has any block there
//   bits 20-: the position, among the blocks of the step, of the first of the slice
constexpr std::uint32_t kPresenceMask = 0xffff;
constexpr std::uint32_t kDepthsMask = 0xf0000;
constexpr int kDepthsShift = 16, kPositionShift = 20;

// Whether the group has a block at depths 16*k to 16*k+15.
__device__ __forceinline__ bool IsOccupied(std::uint32_t word, int k) { return (word >> (kDepthsShift + k) & 1) != 0; }

// Gathers a warp's A, 16 features x 16 depths, from blocks as LaunchPack has left them in `blocks`: for depths 16*k to
// 16*k+15 of the chunk. What is absent becomes zero.
template <int kBlock>
__device__ __forceinline__ void Gather(std::uint32_t (&a)[4], std::uint32_t word, int k, std::uint32_t blocks, int warp,
                                       int lane) {
  constexpr int kBlockBytes = kBlock * kBlock * 2;
  const auto position = [&](int bit) { return (word >> kPositionShift) + __popc(word & ((1u << bit) - 1)); };
  const auto present = [&](int bit) { return (word >> bit & 1) != 0; };
  if constexpr (kBlock == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bit = k * 4 + i;
      a[i] = LoadShared4If(present(bit), blocks + position(bit) * kBlockBytes + lane * 4);
    }
  } else {
    const int bit = k * 16 / kBlock;
    const int inside = kBlock == 32 ? (k % 2 * 2 + warp % 2) * 512 : 0;
    LoadShared16If(present(bit), a, blocks + position(bit) * kBlockBytes + inside + lane * 16);
  }
}

// Steps are (chunk, position of the first block, number of blocks, unused).
template <typename T, int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups, int kStepUnits>
__global__ void __launch_bounds__(kNumWarpgroups * 128 + kProducerThreads, 1)
    MatmulSmallKernel(const __grid_constant__ KernelParams p) {
  using S = SmallTile<kBlock, kTileTokens, kTileFeatures, kNumWarpgroups, kStepUnits>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) std::uint64_t barrier_storage[2 * kMaxStages];

  const int stage_bytes = S::StageBytes(p.capacity);
  const std::uint32_t stages = Opaque((SharedAddress(shared) + kAlignment - 1) & ~(kAlignment - 1));
  const std::uint32_t barriers = Opaque(SharedAddress(barrier_storage));
  const std::uint32_t output = stages + p.stages * stage_bytes;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) Ring::Init(barriers, p.stages, S::kWarpgroups * 4);
  __syncthreads();

  const TileList<S::kTokens, S::kFeatures> tiles(p, blockIdx.x, gridDim.x);
  Ring ring(barriers, p.stages);

  if (warp >= S::kWarpgroups * 4) {
    ShrinkRegisters<ProducerRegisters(S::kWarpgroups)>();
    const int producer = warp - S::kWarpgroups * 4;
    if (producer < kProducers) {
      // Each lane has a step of its warp, every kProducers-th of a tile's, `skipped` steps after the first.
      struct Step {
        int chunk, position, bytes;
      };
      const auto load = [&](const Tile& tile, int first, int skipped) {
        const int i = first + skipped + lane * kProducers;
        const bool is_there = i < p.max_steps && tile.steps >= 0;
        return is_there ? __ldg(p.steps + static_cast<std::int64_t>(tile.list) * p.max_steps + i) : int4{};
      };
      constexpr int kWindow = 32 * kProducers;
      int skipped = producer;
      Tile tile = tiles.Load(0);
      int4 next = load(tile, 0, skipped);
      ring.Advance(producer);
      for (int round = 1; tile.steps >= 0; ++round) {
        const Tile following = tiles.Load(round);
        const int next_skipped = ((skipped - tile.steps) % kProducers + kProducers) % kProducers;
        const auto* blocks_of_batch =
            static_cast<const unsigned char*>(p.packed) + (p.w_shared ? 0 : tile.batch) * p.nnz * S::kBlockBytes;
        const int x_batch = p.x_shared ? 0 : tile.batch;
        for (int first = 0; first == 0 || first < tile.steps; first += kWindow) {
          // Wherever the plan says, what is read is in the array and fits into the stage.
          const int depth = next.x * kChunk;
          const int position = max(0, min(next.y, static_cast<int>(p.nnz)));
          const int bytes = max(0, min(min(next.z, p.capacity), static_cast<int>(p.nnz) - position)) * S::kBlockBytes;
          next = first + kWindow < tile.steps ? load(tile, first + kWindow, skipped) : load(following, 0, next_skipped);
          for (int i = 0; first + skipped + i * kProducers < min(tile.steps, first + kWindow); ++i) {
            const int c = __shfl_sync(kAllLanes, depth, i);
            const int from = __shfl_sync(kAllLanes, position, i);
            const int size = __shfl_sync(kAllLanes, bytes, i);
            if (lane == 0) {
              const std::uint32_t to = stages + ring.stage() * stage_bytes;
              ring.WaitEmpty();
              ArriveExpecting(ring.full(), S::kXBytes + size);
              LoadTensor(to, &p.x, c, tile.token, x_batch, ring.full());
              if (size > 0) {
                LoadBytes(to + S::kXBytes, blocks_of_batch + static_cast<std::int64_t>(from) * S::kBlockBytes, size,
                          ring.full());
              }
            }
            ring.Advance(kProducers);
          }
        }
        skipped = next_skipped;
        tile = following;
      }
    }
    __syncwarp();
  } else {
    GrowRegisters<ConsumerRegisters(S::kWarpgroups)>();
    const int warpgroup = warp / 4;
    const int first_group = warpgroup % (S::kGroups / S::kOwnGroups) * S::kOwnGroups;
    const int first_token = warpgroup / (S::kGroups / S::kOwnGroups) * S::kOwnTokens;

    // The words of each group for 32 steps, one a lane: the warp's own, and the one from which all warps of the group
    // take the depths to multiply.
    struct Words {
      std::uint32_t own[S::kOwnGroups], common[S::kOwnGroups];
    };
    const auto load = [&](const Tile& tile, int first) {
      Words words;
      const int i = first + lane;
      const bool is_there = i < p.max_steps && tile.steps >= 0;
#pragma unroll
      for (int g = 0; g < S::kOwnGroups; ++g) {
        const int group_slice = (first_group + g) * (kGroup / S::kSliceFeatures);
        const int slice = group_slice + warp % 4 * 16 / S::kSliceFeatures;
        const std::uint32_t* list = p.masks + static_cast<std::int64_t>(tile.list) * S::kSlices * p.max_steps + i;
        words.own[g] = is_there ? __ldg(list + static_cast<std::int64_t>(slice) * p.max_steps) : 0;
        words.common[g] = is_there ? __ldg(list + static_cast<std::int64_t>(group_slice) * p.max_steps) : 0;
      }
      return words;
    };
    // Whatever the plan says, products stay converged and reads in the stage.
    const auto combine = [&](const Words& words, std::uint32_t (&window)[S::kOwnGroups]) {
#pragma unroll
      for (int g = 0; g < S::kOwnGroups; ++g) {
        const int blocks = __popc(words.own[g] & kPresenceMask);
        const auto last = static_cast<std::uint32_t>(max(0, p.capacity - blocks));
        window[g] = (words.own[g] & kPresenceMask) | (words.common[g] & kDepthsMask) |
                    min(words.own[g] >> kPositionShift, last) << kPositionShift;
      }
    };

    OutputWriter<T, S::kOwnTokens, S::kBuffers> writer(p, output + warpgroup * S::kBuffers * kPieceBytes, warpgroup);
    Tile tile = tiles.Load(0);
    Words next = load(tile, 0);
    for (int round = 1; tile.steps >= 0; ++round) {
      const Tile following = tiles.Load(round);
      float sum[S::kOwnGroups][S::kOwnTokens / 2] = {};
      std::uint32_t window[S::kOwnGroups];
      std::uint32_t words[S::kOwnGroups];
      std::uint32_t held = 0;  // the barrier of the stage that products under way still read, if any
      const auto release = [&] {
        if (held != 0 && lane == 0) Arrive(held);
        held = 0;
      };

      const auto begin_step = [&](int i) {
        if (i % 32 == 0) {
          combine(next, window);
          next = i + 32 < tile.steps ? load(tile, i + 32) : load(following, 0);
        }
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) words[g] = __shfl_sync(kAllLanes, window[g], i % 32);
        if (!ring.IsFull()) {
          WaitForProducts<0>();  // a stage is not held while waiting for copies
          release();
          ring.WaitFull();
        }
      };
      // One unit of a step. The products of the unit before may still run, those of the one before that, which has
      // used the same registers, do not.
      using Fragments = std::uint32_t[S::kOwnGroups][S::kUnitDepths][4];
      const auto multiply = [&](int unit, Fragments& a) {
        const std::uint32_t x = stages + ring.stage() * stage_bytes;
        // Depths of the same blocks are there or not together.
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) {
#pragma unroll
          for (int k = 0; k < S::kUnitDepths; k += S::kRun) {
            if (!IsOccupied(words[g], unit * S::kUnitDepths + k)) continue;
#pragma unroll
            for (int r = k; r < k + S::kRun; ++r) {
              Gather<kBlock>(a[g][r], words[g], unit * S::kUnitDepths + r, x + S::kXBytes, warp, lane);
            }
          }
        }
        if (PRE) {
          WaitForProducts<0>();
          KeepRegisters(sum);
          release();
        }
        KeepRegisters(a);
        const std::uint64_t tokens = OperandDescriptor(x + first_token * kChunkBytes);
        int issued = 0;
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) {
#pragma unroll
          for (int k = 0; k < S::kUnitDepths; k += S::kRun) {
            if (!IsOccupied(words[g], unit * S::kUnitDepths + k)) continue;
            FenceProducts();
#pragma unroll
            for (int r = k; r < k + S::kRun; ++r) {
              MultiplyRegisters<T>(sum[g], a[g][r], tokens + (unit * S::kUnitDepths + r) * kDepthStepKMajor);
            }
            CommitProducts();
            ++issued;
          }
        }
        if (PRE) {
        } else if (issued >= 4) {
          WaitForProducts<4>();
        } else if (issued >= 2) {
          WaitForProducts<2>();
        } else if (issued == 1) {
          WaitForProducts<1>();
        } else {
          WaitForProducts<0>();
        }
        if (!PRE && unit == 0) release();
        if (unit == S::kUnits - 1) {
          held = ring.empty();
          ring.Advance();
        }
      };

      Fragments even = {}, odd = {};
      if (tile.steps == 0) next = load(following, 0);
      if constexpr (S::kUnits == 1) {
        for (int i = 0; i < tile.steps; i += 2) {
          begin_step(i);
          multiply(0, even);
          KeepRegisters(odd);
          if (i + 1 < tile.steps) {
            begin_step(i + 1);
            multiply(0, odd);
            KeepRegisters(even);
          }
        }
      } else {
        for (int i = 0; i < tile.steps; ++i) {
          begin_step(i);
          multiply(0, even);
          KeepRegisters(odd);
          multiply(1, odd);
          KeepRegisters(even);
        }
      }
      WaitForProducts<0>();
      KeepRegisters(sum);
      KeepRegisters(even);
      KeepRegisters(odd);
      release();
#pragma unroll
      for (int g = 0; g < S::kOwnGroups; ++g) {
        writer.Write(sum[g], tile.feature + (first_group + g) * kGroup, tile.token + first_token, tile.batch);
      }
      tile = following;
    }
    writer.Finish();
  }
}

template <typename T, int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups, int kStepUnits>
cudaError_t LaunchSmall(const MatmulParams& params, cudaStream_t stream) {
  using S = SmallTile<kBlock, kTileTokens, kTileFeatures, kNumWarpgroups, kStepUnits>;
  if (params.capacity < S::kMinCapacity || params.capacity > S::kFullCapacity) return cudaErrorInvalidValue;
  KernelParams p;
  cudaError_t error = FillParams<T>(params, S::kTokens, &p);
  if (error != cudaSuccess) return error;
  const int stage_bytes = S::StageBytes(params.capacity);
  p.packed = params.data;
  p.nnz = params.nnz;
  p.capacity = params.capacity;
  p.stages = StagesThatFit(stage_bytes, S::kOutputBytes);
  const std::int64_t tiles = params.batch * p.token_tiles * p.feature_tiles;
  constexpr auto kKernel = MatmulSmallKernel<T, kBlock, kTileTokens, kTileFeatures, kNumWarpgroups, kStepUnits>;
  return LaunchPersistent<kKernel, 1>(p, tiles, S::kThreads, kAlignment + p.stages * stage_bytes + S::kOutputBytes,
                                      stream);
}

}  // namespace jax_blocksparse::sm90
