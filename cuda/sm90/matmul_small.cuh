// y = x W for blocks of 8, 16 and 32 on Hopper.
//
// A CTA computes a tile of tokens x features. Two warps copy, for each step of the tile's list, a chunk of x (tokens x
// 64 depths), or halves of two, and all blocks of W that meet it, which packing has put next to each other, into a ring
// of stages. Halves cost copies of rows of 64 bytes, which are slower, but then there are fewer of them. The roles are
// swapped: 64 features, a warpgroup's share, are the instruction's M, tokens its N. The warpgroup gathers the 64 x 16
// piece of W^T that a product takes as A from the blocks that are there, into registers; what is absent is read from a
// block of zeros. A piece without any block costs no product. So the tensor cores see the union of the 64 features'
// columns, and a chunk of x is copied once for the union of the tile's columns. CTAs are persistent, so that copies of
// the next tile run while y is written. What bounds it: the tensor cores at high density (at 16 x 16 and density .5,
// 91 % of the dense products remain), else filling shared memory from L2 and the latency of a step, a chain of some
// hundred instructions in each warp.
#pragma once

#include "matmul_common.cuh"
#include "output.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kBlock, int kTileTokens, int kTileFeatures>
struct SmallTile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kFeatures = kTileFeatures;
  static constexpr int kWarpgroups = kFeatures / kGroup;
  // Two warpgroups have registers to gather A while the last one is still read. Four cover for each other.
  static constexpr bool kGathersAhead = kWarpgroups <= 2;
  // Products along a block's depth, or along that of two blocks of 8, which one bit of a mask is about.
  static constexpr int kRun = std::max(16, kBlock) / kDepth<T>;
  static constexpr int kThreads = kWarpgroups * 128 + kProducerThreads;
  static constexpr int kSliceFeatures = SliceFeatures(kBlock);
  static constexpr int kBlockBytes = kBlock * kBlock * sizeof(T);
  static constexpr int kPartBytes = kTokens * kRowBytes, kHalfBytes = kTokens * kHalf * int{sizeof(T)};
  static constexpr bool kPartIsHalf = kParts<T> == 2;  // else it is a chunk
  // Whether a part can be two halves one after the other. With blocks of 8, a tile meets both halves of most chunks.
  static constexpr bool kJoinsHalves = !kPartIsHalf && kBlock > 8;
  static constexpr int kXBytes = kParts<T> * kPartBytes;
  static constexpr int kOutputBytes = OutputWriter<T, kTokens, kWarpgroups, StoredFeatures(kBlock), true>::kSharedBytes;
  static constexpr int kWordBytes = kWarpgroups * 128 * 8;  // of masks, for each thread that multiplies two
  static constexpr int kFullCapacity = kFeatures * kChunk / (kBlock * kBlock);
  static constexpr int kMinCapacity = kSliceFeatures * kChunk / (kBlock * kBlock);  // what a word can name
  static_assert(kBlock == 8 || kBlock == 16 || kBlock == 32);
  static_assert(kProducts % kRun == 0, "a mask's bit is about one part");
  static_assert(kFeatures % kGroup == 0, "a warpgroup has 64 features");
  static_assert(kTokens == 64 || kTokens == 128 || kTokens == 256,
                "there are products, and boxes of copies, for these");
  static_assert(kTokens * kWarpgroups <= 512, "the sums fit into registers");
  static_assert(kFullCapacity <= 256, "eight bits of a mask's first position");
  static_assert(kChunk == 64, "four bits of a mask are about 16 depths each");
  static_assert(kChunk == 2 * kHalf && kHalf % std::max(16, kBlock) == 0, "a block is in one half");
  static_assert(kHalfBytes % 1024 == 0, "swizzles begin with each half");

  // A chunk of x, the blocks that meet it, a block of zeros.
  static constexpr int StageBytes(int capacity) {
    return kXBytes + ((capacity + 1) * kBlockBytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

// What a warp needs to know about its 16 features in a step, in one word, and how it gathers A by it. It is made from
// the word of their slice in the plan's masks. Which products there are is up to one that all warps of the group read.
// Such words say:
//   bits 0-15: the blocks present, by row of the chunk and, for blocks of 8, column of the slice
//   bits 16-19: for each 16 depths, whether the group has any block there
//   bits 20-27: the position, among the blocks of the step, of the first of the slice
//   bit 28: whether the halves of x are copied one by one
// Whatever the plan says, the warps of a group take the same products and read in the stage.
constexpr std::uint32_t kPresenceMask = 0xffff;
constexpr int kDepthsShift = 16, kPositionShift = 20, kApartShift = 28;
__device__ __forceinline__ int PositionOf(std::uint32_t own) { return own >> kPositionShift & 0xff; }

// Bits 7*r to 7*r+6: the position of the block in row r of the chunk; an absent one is read from the block of zeros
// that follows the last.
template <typename T, int kBlock>
struct StepWord {
  static constexpr int kPieceBytes = 16 * kDepthBytes;  // of W: 16 features x what a product takes of their depth
  static constexpr int kBlockBytes = kBlock * kBlock * sizeof(T);
  static constexpr int kRows = kChunk / kBlock;
  static_assert(kRows <= 4 && 256 * kChunk / (kBlock * kBlock) < 128, "four positions of seven bits");

  static __device__ __forceinline__ std::uint32_t Make(std::uint32_t own, int capacity) {
    std::uint32_t word = 0;
    int position = PositionOf(own);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool present = own >> row & 1;
      word |= static_cast<std::uint32_t>(present ? min(position, capacity) : capacity) << (7 * row);
      position += present;
    }
    return word;
  }

  // For one product, if it is to be, which begins at this depth of the chunk. `blocks` is where the lane finds its part
  // of the first block.
  static __device__ __forceinline__ void Gather(bool is_to_be, std::uint32_t (&a)[4], std::uint32_t word, int depth,
                                                std::uint32_t blocks) {
    const std::uint32_t position = word >> (7 * (depth / kBlock)) & 127;
    LoadShared16If(is_to_be, a, blocks + position * kBlockBytes + depth % kBlock / kDepth<T> * kPieceBytes);
  }

  static __device__ __forceinline__ int OffsetOfLane(int warp, int lane) {
    return warp * 16 % kBlock / 16 * (kBlock / kDepth<T> * kPieceBytes) + lane * 16;
  }
};

// The plan's own word, its position made safe: sixteen blocks are too many for the other form.
template <typename T>
struct StepWord<T, 8> {
  static __device__ __forceinline__ std::uint32_t Make(std::uint32_t own, int capacity) {
    const int last = max(0, capacity - __popc(own & kPresenceMask));
    return (own & kPresenceMask) | static_cast<std::uint32_t>(min(PositionOf(own), last)) << kPositionShift;
  }

  static __device__ __forceinline__ void Gather(bool is_to_be, std::uint32_t (&a)[4], std::uint32_t word, int depth,
                                                std::uint32_t blocks) {
    if (!is_to_be) return;
    constexpr int kBlocks = kDepth<T> / 8 * 2;  // of a product
    constexpr int kLaneBytes = 2 * sizeof(T);   // of a block
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int bit = depth / 8 * 2 + i;
      const std::uint32_t position = (word >> kPositionShift) + __popc(word & ((1u << bit) - 1));
      const std::uint32_t block = blocks + position * (32 * kLaneBytes);
      if constexpr (kLaneBytes == 4) {
        a[i] = LoadShared4OrZero(word >> bit & 1, block);
      } else {  // of two depths, for the same features
        const uint2 values = LoadShared8OrZero(word >> bit & 1, block);
        a[i] = values.x;
        a[i + 2] = values.y;
      }
    }
  }

  static __device__ __forceinline__ int OffsetOfLane(int, int lane) { return lane * 2 * sizeof(T); }
};

// Steps are (first half of a chunk, position of the first block, number of blocks, second half).
template <typename T, int kBlock, int kTileTokens, int kTileFeatures, bool kFuses>
__global__ void __launch_bounds__(SmallTile<T, kBlock, kTileTokens, kTileFeatures>::kThreads, 1)
    MatmulSmallKernel(const __grid_constant__ KernelParams p) {
  using S = SmallTile<T, kBlock, kTileTokens, kTileFeatures>;
  using Word = StepWord<T, kBlock>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) std::uint64_t barrier_storage[2 * kMaxStages];

  const int stage_bytes = S::StageBytes(p.capacity);
  const std::uint32_t stages = Opaque((SharedAddress(shared) + kAlignment - 1) & ~(kAlignment - 1));
  const std::uint32_t barriers = Opaque(SharedAddress(barrier_storage));
  const std::uint32_t output = stages + p.stages * stage_bytes;
  const std::uint32_t words = output + S::kOutputBytes + threadIdx.x * 8;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  const int lane = static_cast<int>(Opaque(threadIdx.x % 32));

  for (int i = threadIdx.x; i < p.stages * S::kBlockBytes / 4; i += S::kThreads) {
    const int stage = i / (S::kBlockBytes / 4), inside = i % (S::kBlockBytes / 4) * 4;
    StoreShared4(stages + stage * stage_bytes + S::kXBytes + p.capacity * S::kBlockBytes + inside, 0);
  }
  // Stages are handed back by all lanes, each for its own reads. One for its warp would take no less time, and nothing
  // would order the others' reads before the next copy: the compiler drops a __syncwarp() of a converged warp.
  if (threadIdx.x == 0) Ring::Init(barriers, p.stages, 1, S::kWarpgroups * 128);
  __syncthreads();

  const TileList<S::kTokens> tiles(p, blockIdx.x, gridDim.x, warp / 4);
  Ring ring(barriers, p.stages);

  if (warp >= S::kWarpgroups * 4) {
    ShrinkRegisters<ProducerRegisters(S::kWarpgroups)>();
    const auto copy = [&](const Tile& tile, const int4& step, int, const Ring& ring) {
      const std::uint32_t to = stages + ring.stage() * stage_bytes;
      // Wherever the plan says, what is read is in the array and fits into the stage.
      const int first = max(0, min(step.y, p.nnz));
      const int bytes = max(0, min(min(step.z, p.capacity), p.nnz - first)) * S::kBlockBytes;
      ArriveExpecting(ring.full(), S::kXBytes + bytes);
      const int x_batch = p.x_shared ? 0 : tile.batch;
      const bool is_chunk = !S::kJoinsHalves || (step.x % 2 == 0 && step.w == step.x + 1);
      if (!S::kPartIsHalf && is_chunk) {
        LoadTensor(to, &p.x, step.x * kHalf, tile.token, x_batch, ring.full());
      } else {
        const CUtensorMap* halves = S::kPartIsHalf ? &p.x : &p.x_halves;
        LoadTensor(to, halves, step.x * kHalf, tile.token, x_batch, ring.full());
        LoadTensor(to + S::kHalfBytes, halves, step.w * kHalf, tile.token, x_batch, ring.full());
      }
      if (bytes == 0) return;
      const std::int64_t block = static_cast<std::int64_t>(p.w_shared ? 0 : tile.batch) * p.nnz + first;
      LoadBytes(to + S::kXBytes, static_cast<const unsigned char*>(p.packed) + block * S::kBlockBytes, bytes,
                ring.full());
    };
    const auto copy_scale = [&](const Tile& tile, int group, const Ring& ring) {
      ArriveExpecting(ring.full(), S::kXBytes);
      constexpr int kStored = StoredFeatures(kBlock);
#pragma unroll
      for (int i = 0; i < kGroup / kStored; ++i) {
        LoadTensor(stages + ring.stage() * stage_bytes + i * S::kTokens * kStored * 2, &p.scale,
                   Tile::FeatureOf(__ldg(tile.panels + group), i), tile.token,
                   p.epilogue.scale_batch_stride == 0 ? 0 : tile.batch, ring.full());
      }
    };
    if (const int producer = warp - S::kWarpgroups * 4; producer < kProducers) {
      WaitForPrerequisites();  // they pack W
      Produce<1, kFuses>(p, tiles, ring, lane, producer, S::kWarpgroups, copy, copy_scale);
    }
    __syncwarp();
  } else {
    GrowRegisters<ConsumerRegisters(S::kWarpgroups)>();
    const int group = warp / 4;
    const std::uint32_t lane_blocks = S::kXBytes + Word::OffsetOfLane(warp % 4, lane);

    // Asks for the plan's words of 32 steps, the warp's own ones and those of the group, one step in each lane. They
    // wait in shared memory until they are needed: registers are scarce.
    const auto load = [&](const Tile& tile, int first) {
      const int i = first + lane;
      const bool is_there = i < tile.steps;
      const std::int32_t* list = p.masks + tile.batch * p.plan_batch_stride + (is_there ? tile.first_step + i : 0);
      const std::int64_t group_slice = group * (kGroup / S::kSliceFeatures);
      const std::int64_t slice = group_slice + warp % 4 * 16 / S::kSliceFeatures;
      LoadWord(words, list + slice * p.max_steps, is_there);
      LoadWord(words + 4, list + group_slice * p.max_steps, is_there);
    };

    const auto release = [](std::uint32_t barrier) { Arrive(barrier); };
    OutputWriter<T, S::kTokens, S::kWarpgroups, StoredFeatures(kBlock), kFuses> writer(p, output, group);
    Tile tile = tiles.Load(0);
    load(tile, 0);
    for (int round = 1; tile.steps >= 0; ++round) {
      const Tile following = tiles.Load(round);
      float sum[S::kTokens / 2] = {};
      int i = 0;                 // the step
      std::uint32_t window = 0;  // the words of 32 steps, one in each lane
      // For each 16 depths a bit for each of these steps: whether the group has any block there.
      std::uint32_t occupied[kChunk / 16] = {};
      std::uint32_t apart = 0;  // for each of these steps, whether the halves of x are
      std::uint32_t held = 0;   // the barrier of the stage that products under way still read, if any
      const auto finish = [&] {
        WaitForProducts<0>();
        if (held != 0) release(held);
        held = 0;
      };
      // Goes on to the next step in which the group has a block, if there is one. The others are handed back unread,
      // but not before they are full: who runs ahead of the copies could mistake a barrier's phase for the next but
      // one.
      const auto find = [&] {
        for (; i < tile.steps; ++i) {
          if (i % 32 == 0) {
            WaitForWords();
            const uint2 next = LoadShared8(words);
            window = Word::Make(next.x, p.capacity);
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) {
              occupied[k] = __ballot_sync(kAllLanes, next.y >> (kDepthsShift + k) & 1);
            }
            if constexpr (S::kJoinsHalves) apart = __ballot_sync(kAllLanes, next.y >> kApartShift & 1);
            i + 32 < tile.steps ? load(tile, i + 32) : load(following, 0);
          }
          if (!ring.IsFull()) {
            finish();  // a stage is not held while waiting for copies
            ring.WaitFull();
          }
          if ((occupied[0] | occupied[1] | occupied[2] | occupied[3]) >> i % 32 & 1) return true;
          release(ring.empty());
          ring.Advance();
        }
        return false;
      };

      using Fragments = std::uint32_t[kProducts][4];
      std::uint32_t word = 0;
      // Takes a part of the step that was found, by the registers `a`; the products of the last part may still run and
      // read `last_a`.
      const auto multiply = [&](int part, Fragments& a, Fragments& last_a) {
        // The compiler must not see that this is the same in all lanes: it would use uniform registers, which take
        // longer.
        if (part == 0) word = __shfl_sync(kAllLanes, window, i + lane * 32);
        const int first = part * kRowElements<T>;
        bool takes[kProducts];
#pragma unroll
        for (int k = 0; k < kProducts; ++k) {
          takes[k] = occupied[(first + k / S::kRun * S::kRun * kDepth<T>) / 16] >> i % 32 & 1;
        }
        if constexpr (!S::kGathersAhead) {
          finish();
          KeepRegisters(sum);
          KeepRegisters(a);
        }
        const std::uint32_t stage = stages + ring.stage() * stage_bytes;
        const bool is_apart = apart >> i % 32 & 1;
#pragma unroll
        for (int k = 0; k < kProducts; ++k) {
          Word::Gather(takes[k], a[k], word, first + k * kDepth<T>, stage + lane_blocks);
        }
        if constexpr (S::kGathersAhead) {
          finish();
          KeepRegisters(sum);
          KeepRegisters(last_a);
        }
        KeepRegisters(a);
        if (part == kParts<T> - 1) {
          held = ring.empty();
          ring.Advance();
          ++i;
        }
        const std::uint32_t x = stage + part * S::kPartBytes;
        const std::uint64_t tokens = is_apart ? OperandDescriptor<kRowBytes / 2>(x) : OperandDescriptor(x);
        constexpr int kTogether = kHalf / kDepth<T> * kDepthStepKMajor, kApart = S::kHalfBytes >> 4;
        const int second_half = is_apart ? kApart - kTogether : 0;
#pragma unroll
        for (int k = 0; k < kProducts; k += S::kRun) {
          if (!takes[k]) continue;
          FenceProducts();
#pragma unroll
          for (int r = k; r < k + S::kRun; ++r) {
            const bool is_second = r * kDepth<T> >= kHalf;
            MultiplyRegisters<T>(sum, a[r], tokens + r * kDepthStepKMajor + (is_second ? second_half : 0));
          }
          CommitProducts();
        }
      };

      if (tile.steps == 0) {
        WaitForWords();  // no copy may follow another one to the same place unawaited
        load(following, 0);
      }
      float2 biases;
      if constexpr (S::kGathersAhead) {
        Fragments even = {}, odd = {};
        while (find()) {
          multiply(0, even, odd);
          if constexpr (kParts<T> == 2) {
            multiply(1, odd, even);
          } else {
            if (!find()) break;
            multiply(0, odd, even);
          }
        }
        biases = writer.LoadBiases(tile);
        finish();
        KeepRegisters(even);
        KeepRegisters(odd);
      } else {
        Fragments a = {};
        while (find()) {
#pragma unroll
          for (int part = 0; part < kParts<T>; ++part) multiply(part, a, a);
        }
        biases = writer.LoadBiases(tile);
        finish();
        KeepRegisters(a);
      }
      KeepRegisters(sum);
      writer.Write(sum, biases, tile, tile.token, ring, stages, stage_bytes, release);
      tile = following;
    }
    writer.Finish();
  }
}

template <typename T, int kBlock, int kTileTokens, int kTileFeatures>
cudaError_t LaunchSmall(const MatmulParams& params, cudaStream_t stream) {
  using S = SmallTile<T, kBlock, kTileTokens, kTileFeatures>;
  if (params.capacity < S::kMinCapacity || params.capacity > S::kFullCapacity) return cudaErrorInvalidValue;
  KernelParams p;
  if (const cudaError_t error = FillParams<T>(params, S::kTokens, StoredFeatures(kBlock), &p); error != cudaSuccess)
    return error;
  if constexpr (S::kJoinsHalves) {
    TensorMapSpec halves = XMapSpec<T>(params, S::kTokens);
    halves.box_row_bytes = kHalf * sizeof(T);
    if (const cudaError_t error = EncodeTensorMap(&p.x_halves, halves); error != cudaSuccess) return error;
  }
  const int stage_bytes = S::StageBytes(params.capacity);
  p.packed = params.data;
  p.capacity = params.capacity;
  p.stages = StagesThatFit(stage_bytes, S::kOutputBytes + S::kWordBytes);
  const int shared_bytes = kAlignment + p.stages * stage_bytes + S::kOutputBytes + S::kWordBytes;
  return WithFusing<T>(p.epilogue, [&](auto fuses) {
    constexpr auto kKernel = MatmulSmallKernel<T, kBlock, kTileTokens, kTileFeatures, decltype(fuses)::value>;
    return LaunchPersistent<kKernel, 1, true>(p, params.sms, S::kThreads, shared_bytes, stream);
  });
}

}  // namespace jax_blocksparse::sm90
