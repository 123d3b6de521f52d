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

template <int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups>
struct SmallTile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kFeatures = kTileFeatures;
  static constexpr int kWarpgroups = kNumWarpgroups;
  static constexpr int kGroups = kFeatures / kGroup;
  // Warpgroups share the groups; if there are more of them than groups, they share the tokens as well.
  static constexpr int kOwnGroups = std::max(1, kGroups / kWarpgroups);
  static constexpr int kParts = std::max(1, kWarpgroups / kGroups);
  static constexpr int kOwnTokens = kTokens / kParts;
  // How much of a step's A is gathered at a time: as much as two of fit into the registers that the sums leave.
  static constexpr int kUnits = kWarpgroups > 2 ? 2 : 1;
  static constexpr int kUnitDepths = kChunk / 16 / kUnits;
  static constexpr int kThreads = kWarpgroups * 128 + kProducerThreads;
  static constexpr int kSliceFeatures = SliceFeatures(kBlock);
  static constexpr int kSlices = kFeatures / kSliceFeatures;
  static constexpr int kBlockBytes = kBlock * kBlock * 2;
  static constexpr int kXBytes = kTokens * kChunkBytes;
  static constexpr int kBuffers = kOwnGroups > 1 ? 2 : 1;
  static constexpr int kOutputBytes = kWarpgroups * kBuffers * kPieceBytes;
  static constexpr int kZeroBytes = 1024;
  static constexpr int kFullCapacity = kFeatures * kChunk / (kBlock * kBlock);
  static constexpr int kMinCapacity = kSliceFeatures * kChunk / (kBlock * kBlock);  // what a word can name
  static_assert(kBlock == 8 || kBlock == 16 || kBlock == 32);
  static_assert(kGroups * kParts == kOwnGroups * kWarpgroups && kFeatures % kGroup == 0, "the work is split evenly");
  static_assert(kOwnTokens == 128 || kOwnTokens == 256, "there are products for these widths");
  static_assert(kOwnGroups * kOwnTokens <= 256, "the sums fit into registers");
  static_assert(kTokens <= 256, "one box of a tensor copy");
  static_assert(kFullCapacity * kBlockBytes <= kWUnits * kWUnit, "a full chunk of W is one copy");
  static_assert(kFullCapacity <= 256, "eight bits of a mask's first position");

  static constexpr int StageBytes(int capacity) {
    return kXBytes + (capacity * kBlockBytes + kWUnit - 1) / kWUnit * kWUnit;
  }
};

// A word of the plan's masks, for one slice (16 features, or 32 for blocks of 32) and one step.
//   bits 0-15: the blocks present, by row of the chunk and, for blocks of 8, column of the slice
//   bits 16-19: for each 16 depths, whether the slice's group of 64 features has any block there
//   bits 20-: the position, among the blocks of the step, of the first of the slice
constexpr std::uint32_t kPresenceMask = 0xffff;
constexpr std::uint32_t kDepthsMask = 0xf0000;
constexpr int kDepthsShift = 16, kPositionShift = 20;

// Where a lane finds its row of the 8x8 matrices that make up a warp's A: 16 features x 16 depths of blocks in shared
// memory. Block data lies in rows of 128 bytes with the 128-byte swizzle whatever the block size, so that the eight
// rows of a matrix are in different banks.
template <int kBlock>
class FragmentAddresses {
 public:
  // Matrices 0 and 1 are features 0-7 and 8-15 of depths 0-7, matrices 2 and 3 of depths 8-15.
  __device__ FragmentAddresses(int warp, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (kBlock == 8) {
      matrix_ = matrix;
      offset_ = row * 16;
    } else {
      const int depth = row + matrix / 2 * 8, feature = warp * 16 % kBlock + matrix % 2 * 8;
      offset_ = depth * (kBlock * 2) + feature * 2;
      offset_ ^= offset_ >> 7 << 4 & 0x70;
    }
  }

  // For depths 16*k to 16*k+15 of the chunk. `zeros` is where an absent block is read from.
  __device__ std::uint32_t At(std::uint32_t word, int k, std::uint32_t blocks, std::uint32_t zeros) const {
    constexpr int kBlockBytes = kBlock * kBlock * 2;
    const int bit = kBlock == 8 ? k * 4 + matrix_ : k * 16 / kBlock;
    const std::uint32_t below = (1u << bit) - 1;
    const std::uint32_t position = (word >> kPositionShift) + __popc(word & below);
    const bool present = word >> bit & 1;
    std::uint32_t offset = offset_;
    if constexpr (kBlock == 8) offset ^= position << 4 & 0x70;
    if constexpr (kBlock == 16) offset ^= position << 6 & 0x40;  // four rows of 128 bytes a block
    const std::uint32_t inside = kBlock == 32 ? k % 2 * 1024 : 0;
    return present ? blocks + position * kBlockBytes + inside + offset : zeros + offset;
  }

 private:
  int matrix_ = 0;
  std::uint32_t offset_;
};

// Steps are (chunk, position of the first block, number of blocks, unused).
template <typename T, int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups>
__global__ void __launch_bounds__(kNumWarpgroups * 128 + kProducerThreads, 1)
    MatmulSmallKernel(const __grid_constant__ KernelParams p) {
  using S = SmallTile<kBlock, kTileTokens, kTileFeatures, kNumWarpgroups>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) std::uint64_t barrier_storage[2 * kMaxStages];

  const int stage_bytes = S::StageBytes(p.capacity);
  const std::uint32_t stages = (SharedAddress(shared) + kAlignment - 1) & ~(kAlignment - 1);
  const std::uint32_t barriers = SharedAddress(barrier_storage);
  const std::uint32_t output = stages + p.stages * stage_bytes;
  const std::uint32_t zeros = output + S::kOutputBytes;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  for (int i = threadIdx.x; i < S::kZeroBytes / 4; i += S::kThreads) StoreShared4(zeros + i * 4, 0);
  if (threadIdx.x == 0) Ring::Init(barriers, p.stages, S::kWarpgroups * 4);
  __syncthreads();

  const TileList<S::kTokens, S::kFeatures> tiles(p, blockIdx.x, gridDim.x);
  Ring ring(barriers, p.stages);

  if (warp >= S::kWarpgroups * 4) {
    ShrinkRegisters<ProducerRegisters(S::kWarpgroups)>();
    if (warp == S::kWarpgroups * 4) {
      const auto load = [&](const Tile& tile, int first) {
        const int i = first + lane;
        return i < p.max_steps && tile.steps >= 0
                   ? __ldg(p.steps + static_cast<std::int64_t>(tile.list) * p.max_steps + i)
                   : int4{};
      };
      Tile tile = tiles.Load(0);
      int4 next = load(tile, 0);
      for (int round = 1; tile.steps >= 0; ++round) {
        const Tile following = tiles.Load(round);
        for (int first = 0; first == 0 || first < tile.steps; first += 32) {
          const int4 window = next;
          next = first + 32 < tile.steps ? load(tile, first + 32) : load(following, 0);
          const int count = min(32, tile.steps - first);
          for (int i = 0; i < count; ++i) {
            const int chunk = __shfl_sync(kAllLanes, window.x, i);
            const int position = __shfl_sync(kAllLanes, window.y, i);
            const int blocks = max(0, min(__shfl_sync(kAllLanes, window.z, i), p.capacity));
            if (lane == 0) {
              const std::uint32_t to = stages + ring.stage() * stage_bytes;
              const int units = (blocks * S::kBlockBytes + kWUnit - 1) / kWUnit;
              ring.WaitEmpty();
              ArriveExpecting(ring.full(), S::kXBytes + units * kWUnit);
              LoadTensor(to, &p.x, chunk * kChunk, tile.token, p.x_shared ? 0 : tile.batch, ring.full());
              if (units > 0) {
                LoadTensor(to + S::kXBytes, &p.w[units - 1], 0, position * (S::kBlockBytes / 128),
                           p.w_shared ? 0 : tile.batch, ring.full());
              }
            }
            ring.Advance();
          }
        }
        tile = following;
      }
    }
    __syncwarp();
  } else {
    GrowRegisters<ConsumerRegisters(S::kWarpgroups)>();
    const int warpgroup = warp / 4;
    const int first_group = warpgroup % (S::kGroups / S::kOwnGroups) * S::kOwnGroups;
    const int first_token = warpgroup / (S::kGroups / S::kOwnGroups) * S::kOwnTokens;
    const FragmentAddresses<kBlock> addresses(warp % 4, lane);

    // The words of one group for 32 steps, one a lane. All warps of a group take the depths to multiply from the same
    // word, and positions are clamped: whatever the plan says, products stay converged and reads in the stage.
    const auto load = [&](const Tile& tile, int first, std::uint32_t (&words)[S::kOwnGroups]) {
      const int i = first + lane;
      const bool is_there = i < p.max_steps && tile.steps >= 0;
#pragma unroll
      for (int g = 0; g < S::kOwnGroups; ++g) {
        const int group_slice = (first_group + g) * (kGroup / S::kSliceFeatures);
        const int slice = group_slice + warp % 4 * 16 / S::kSliceFeatures;
        const std::uint32_t* list = p.masks + static_cast<std::int64_t>(tile.list) * S::kSlices * p.max_steps + i;
        const std::uint32_t own = is_there ? __ldg(list + static_cast<std::int64_t>(slice) * p.max_steps) : 0;
        const std::uint32_t shared_word =
            is_there ? __ldg(list + static_cast<std::int64_t>(group_slice) * p.max_steps) : 0;
        const std::uint32_t blocks = __popc(own & kPresenceMask);
        const auto last = static_cast<std::uint32_t>(max(0, p.capacity - static_cast<int>(blocks)));
        const std::uint32_t position = min(own >> kPositionShift, last);
        words[g] = (own & kPresenceMask) | (shared_word & kDepthsMask) | position << kPositionShift;
      }
    };

    OutputWriter<T, S::kOwnTokens, S::kBuffers> writer(p, output + warpgroup * S::kBuffers * kPieceBytes, warpgroup);
    Tile tile = tiles.Load(0);
    std::uint32_t next[S::kOwnGroups];
    load(tile, 0, next);
    for (int round = 1; tile.steps >= 0; ++round) {
      const Tile following = tiles.Load(round);
      float sum[S::kOwnGroups][S::kOwnTokens / 2] = {};
      std::uint32_t window[S::kOwnGroups];
      std::uint32_t held = 0;  // the barrier of the stage that products under way still read, if any

      const auto finish = [&] {
        WaitForProducts<0>();
        if (held != 0 && lane == 0) Arrive(held);
        held = 0;
      };

      // Gathers the A of unit `unit` of a step into `a` while the products of the last unit still read `last_a`.
      using Fragments = std::uint32_t[S::kOwnGroups][S::kUnitDepths][4];
      std::uint32_t words[S::kOwnGroups];
      const auto multiply = [&](int unit, Fragments& a, Fragments& last_a) {
        const std::uint32_t x = stages + ring.stage() * stage_bytes;
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) {
#pragma unroll
          for (int k = 0; k < S::kUnitDepths; ++k) {
            const int depth = unit * S::kUnitDepths + k;
            if (words[g] >> (kDepthsShift + depth) & 1) {
              LoadMatrices<true>(a[g][k], addresses.At(words[g], depth, x + S::kXBytes, zeros));
            }
          }
        }
        if (unit == 0) {
          finish();
          held = ring.empty();
        } else {
          WaitForProducts<0>();
        }
        KeepRegisters(sum);
        KeepRegisters(last_a);
        KeepRegisters(a);
        const std::uint64_t tokens = OperandDescriptor(x + first_token * kChunkBytes);
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) {
#pragma unroll
          for (int k = 0; k < S::kUnitDepths; ++k) {
            const int depth = unit * S::kUnitDepths + k;
            if (words[g] >> (kDepthsShift + depth) & 1) {
              FenceProducts();
              MultiplyRegisters<T>(sum[g], a[g][k], tokens + depth * kDepthStepKMajor);
              CommitProducts();
            }
          }
        }
      };
      const auto begin_step = [&](int i) {
        if (i % 32 == 0) {
#pragma unroll
          for (int g = 0; g < S::kOwnGroups; ++g) window[g] = next[g];
          if (i + 32 < tile.steps) {
            load(tile, i + 32, next);
          } else {
            load(following, 0, next);
          }
        }
#pragma unroll
        for (int g = 0; g < S::kOwnGroups; ++g) words[g] = __shfl_sync(kAllLanes, window[g], i % 32);
        if (!ring.IsFull()) {
          finish();  // a stage is not held while waiting for copies
          ring.WaitFull();
        }
      };

      Fragments even = {}, odd = {};
      if (tile.steps == 0) load(following, 0, next);
      if constexpr (S::kUnits == 1) {
        for (int i = 0; i < tile.steps; i += 2) {
          begin_step(i);
          multiply(0, even, odd);
          ring.Advance();
          if (i + 1 < tile.steps) {
            begin_step(i + 1);
            multiply(0, odd, even);
            ring.Advance();
          }
        }
      } else {
        for (int i = 0; i < tile.steps; ++i) {
          begin_step(i);
          multiply(0, even, odd);
          multiply(1, odd, even);
          ring.Advance();
        }
      }
      finish();
      KeepRegisters(sum);
      KeepRegisters(even);
      KeepRegisters(odd);
#pragma unroll
      for (int g = 0; g < S::kOwnGroups; ++g) {
        writer.Write(sum[g], tile.feature + (first_group + g) * kGroup, tile.token + first_token, tile.batch);
      }
      tile = following;
    }
    writer.Finish();
  }
}

template <typename T, int kBlock, int kTileTokens, int kTileFeatures, int kNumWarpgroups>
cudaError_t LaunchSmall(const MatmulParams& params, cudaStream_t stream) {
  using S = SmallTile<kBlock, kTileTokens, kTileFeatures, kNumWarpgroups>;
  if (params.transpose || params.capacity < S::kMinCapacity || params.capacity > S::kFullCapacity) {
    return cudaErrorInvalidValue;
  }
  KernelParams p;
  cudaError_t error = FillParams<T>(params, S::kTokens, &p);
  if (error != cudaSuccess) return error;
  const int stage_bytes = S::StageBytes(params.capacity);
  constexpr int kOtherBytes = S::kOutputBytes + S::kZeroBytes;
  p.capacity = params.capacity;
  p.stages = StagesThatFit(stage_bytes, kOtherBytes);
  constexpr CUtensorMapDataType kType =
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const std::uint64_t rows = static_cast<std::uint64_t>(params.nnz) * (S::kBlockBytes / 128);
  for (int units = 1; units <= kWUnits; ++units) {
    const auto box_rows = static_cast<std::uint32_t>(units * (kWUnit / 128));
    error = EncodeTensorMap(&p.w[units - 1],
                            {params.data, kType, 2, 64, rows, static_cast<std::uint64_t>(params.data_batch), box_rows});
    if (error != cudaSuccess) return error;
  }
  const std::int64_t tiles = params.batch * p.token_tiles * p.feature_tiles;
  constexpr auto kKernel = MatmulSmallKernel<T, kBlock, kTileTokens, kTileFeatures, kNumWarpgroups>;
  return LaunchPersistent<kKernel, 1>(p, tiles, S::kThreads, kAlignment + p.stages * stage_bytes + kOtherBytes, stream);
}

}  // namespace jax_blocksparse::sm90
