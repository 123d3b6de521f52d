// y = x W and dx = dy W^T for blocks of 64 and 128 on Hopper.
//
// A CTA computes 256 tokens x 128 features. Two warps copy, for each step of the tile's list, a chunk of x (256 tokens
// x 64 depths) and the 64 x 64 pieces of W that meet it into a ring of stages; each of two warpgroups multiplies 64 of
// the features with all tokens, where its piece is present. The roles are swapped: features are the instruction's M,
// tokens its N, so that an absent piece saves a whole product and x, the larger operand, is read by wide products. W is
// multiplied as it is stored, or transposed, by the choice of its descriptor: there is no packing, and one image in
// shared memory serves both directions. A cluster of two, where one pays, takes neighbouring token tiles, which need
// the same pieces of W: each fetches half of them for both. Few tokens or features make tiles of 64 tokens. CTAs are
// persistent, so that copies of the next tile run while y is written. Where memory bounds, tiles have 128 tokens, and
// two teams of two warpgroups take turns with them: one writes while the other one multiplies. Of float, which takes
// twice the room, a stage has half a chunk; there the instruction reads along the depth only, so W comes transposed by
// packing where it must be.
// What bounds it: the tensor cores for blocks of 128 at high density; filling shared memory from L2 for blocks of 64,
// where a chunk of x serves 1 to 2 pieces; reading x and writing y at low density.
#pragma once

#include "matmul_common.cuh"
#include "output.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kBlock, int kTileTokens>
struct LargeTile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kFeatures = 128;
  static constexpr int kWarpgroups = kFeatures / kGroup;         // of a team
  static constexpr int kTeams = kTokens == 128 ? 2 : 1;          // that many sums leave registers for two
  static constexpr int kConsumers = kTeams * kWarpgroups * 128;  // threads
  static constexpr int kThreads = kConsumers + kProducerThreads;
  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kPieceOfW = kGroup * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWarpgroups * kPieceOfW;
  static constexpr int kOutputBytes = kTeams * OutputWriter<T, kTokens, kWarpgroups, kGroup, true>::kSharedBytes;
  static constexpr int kStages = StagesThatFit(kStageBytes, kOutputBytes);
  static constexpr int kSharedBytes = kAlignment + kStages * kStageBytes + kOutputBytes;
  static constexpr int kTurnBarrier = 1 + kTeams * kWarpgroups;  // the first of the teams', behind the warpgroups'
  static_assert(kBlock == 64 || kBlock == 128,
                "a chunk is a block's depth or half of it, a group its width or half of it");
  static_assert(kWarpgroups == 2, "a step names two pieces of W");
  static_assert(kTokens == 64 || kTokens == 128 || kTokens == 256, "there are products for these widths");
  static_assert(kPieceOfW % kAlignment == 0 && kXBytes % kAlignment == 0);
  static_assert(kGroup == kChunk, "a piece of W has 64 rows either way");
  static_assert(kStages >= 3, "one multiplied, one released late, one filled");
};

// Zeroes what a piece of W, 64 rows of 128 bytes, has at depths that x does not have, where W may hold anything: x is
// zero there, but zero times NaN is not. Depths are rows or, with kDepthInner, columns; x has a multiple of 16 bytes.
template <typename T, bool kDepthInner>
__device__ __forceinline__ void ClearBeyond(std::uint32_t piece, int depth) {
  constexpr int kSixteenBytes = 16 / sizeof(T);
  for (int i = threadIdx.x % 128; i < 64 * 8; i += 128) {
    const int outer = i / 8, inner = i % 8;
    if (kDepthInner ? inner * kSixteenBytes >= depth : outer >= depth) {
      StoreShared16(piece + Swizzled(outer, inner), uint4{});
    }
  }
}

// Steps are (chunk, id of the first group's block, id of the second's, unused); absent ids are negative.
template <typename T, int kBlock, bool kTranspose, int kTileTokens, int kCluster, bool kFuses>
__global__ void __launch_bounds__(LargeTile<T, kBlock, kTileTokens>::kThreads, 1)
    MatmulLargeKernel(const __grid_constant__ KernelParams p) {
  using L = LargeTile<T, kBlock, kTileTokens>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) std::uint64_t barrier_storage[2 * kMaxStages];

  const std::uint32_t stages = Opaque((SharedAddress(shared) + kAlignment - 1) & ~(kAlignment - 1));
  const std::uint32_t barriers = Opaque(SharedAddress(barrier_storage));
  const std::uint32_t output = stages + L::kStages * L::kStageBytes;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  const int lane = static_cast<int>(Opaque(threadIdx.x % 32));
  const int rank = kCluster == 1 ? 0 : static_cast<int>(ClusterRank());

  if (threadIdx.x == 0) Ring::Init(barriers, L::kStages, 1, L::kWarpgroups * 4 * kCluster);
  __syncthreads();
  if constexpr (kCluster > 1) SyncCluster();

  const TileList<L::kTokens * kCluster> tiles(p, blockIdx.x / kCluster, gridDim.x / kCluster,
                                              warp / 4 % L::kWarpgroups);
  Ring ring(barriers, L::kStages);

  if (warp >= L::kConsumers / 32) {
    ShrinkRegisters<ProducerRegisters(L::kTeams * L::kWarpgroups)>();
    const auto copy = [&](const Tile& tile, const int4& step, int part, const Ring& ring) {
      const int first = step.x * kChunk + part * kRowElements<T>, ids[] = {step.y, step.z};
      const std::uint32_t to = stages + ring.stage() * L::kStageBytes;
      ArriveExpecting(ring.full(), L::kXBytes + ((ids[0] >= 0) + (ids[1] >= 0)) * L::kPieceOfW);
      LoadTensor(to, &p.x, first, tile.token + rank * L::kTokens, p.x_shared ? 0 : tile.batch, ring.full());
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        if (ids[group] < 0 || (kCluster > 1 && group != rank)) continue;
        const int depth = first % kBlock, feature = group * kGroup % kBlock;
        const int row = ids[group] * kBlock + (kTranspose ? feature : depth);
        const int column = kTranspose ? depth : feature;
        const int batch = p.w_shared ? 0 : tile.batch;
        const std::uint32_t piece = to + L::kXBytes + group * L::kPieceOfW;
        if constexpr (kCluster > 1) {
          LoadTensorMulticast(piece, &p.w, column, row, batch, ring.full(), (1 << kCluster) - 1);
        } else {
          LoadTensor(piece, &p.w, column, row, batch, ring.full());
        }
      }
    };
    const auto copy_scale = [&](const Tile& tile, int group, const Ring& ring) {
      ArriveExpecting(ring.full(), L::kXBytes);
      LoadTensor(stages + ring.stage() * L::kStageBytes, &p.scale, Tile::FeatureOf(__ldg(tile.panels + group), 0),
                 tile.token + rank * L::kTokens, p.epilogue.scale_batch_stride == 0 ? 0 : tile.batch, ring.full());
    };
    if (const int producer = warp - L::kConsumers / 32; producer < kProducers) {
      Produce<kParts<T>, kFuses>(p, tiles, ring, lane, producer, L::kWarpgroups, copy, copy_scale);
    }
    __syncwarp();
  } else {
    GrowRegisters<ConsumerRegisters(L::kTeams * L::kWarpgroups)>();
    const int group = warp / 4 % L::kWarpgroups, team = warp / 4 / L::kWarpgroups;
    const auto load = [&](const Tile& tile, int first) {
      const int i = first + lane;
      if (i >= tile.steps) return int2{0, -1};
      const int* step = reinterpret_cast<const int*>(StepOf(p, tile, i));
      return int2{__ldg(step), __ldg(step + 1 + group)};
    };
    const auto arrive = [&](std::uint32_t barrier) {
      if constexpr (kCluster > 1) {
        if (lane < kCluster) ArriveAt(barrier, lane);
      } else {
        if (lane == 0) Arrive(barrier);
      }
    };
    OutputWriter<T, L::kTokens, L::kWarpgroups, kGroup, kFuses> writer(p, output, warp / 4);
    Tile tile = tiles.Load(team);
    if (team > 0) ring.Skip(max(0, tiles.Load(0).steps) * kParts<T>);
    int2 next = load(tile, 0);
    for (int round = team; tile.steps >= 0; round += L::kTeams) {
      const Tile following = tiles.Load(round + L::kTeams);
      const int others_steps = L::kTeams > 1 ? tiles.Load(round + 1).steps : -1;
      // When the other team has seen its stages full, this one's are next: no phase of a barrier can be mistaken.
      if (L::kTeams > 1 && round > 0) WaitForTurn<L::kConsumers>(L::kTurnBarrier + team);
      float sum[L::kTokens / 2];
#pragma unroll
      for (float& s : sum) s = 0.f;
      std::uint32_t held = 0;  // the barrier of the stage that products under way still read, if any
      const auto release = [&] {
        if (held != 0) arrive(held);
        held = 0;
      };
      int2 window = next;
      next = 32 < tile.steps ? load(tile, 32) : load(following, 0);
      for (int i = 0; i < tile.steps; ++i) {
        if (i % 32 == 0 && i > 0) {
          window = next;
          next = i + 32 < tile.steps ? load(tile, i + 32) : load(following, 0);
        }
        const int chunk = __shfl_sync(kAllLanes, window.x, i % 32);
        const int id = __shfl_sync(kAllLanes, window.y, i % 32);
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) {
          const std::uint32_t stage = stages + ring.stage() * L::kStageBytes;
          if (!ring.IsFull()) {
            WaitForProducts<0>();  // a stage is not held while waiting for copies
            release();
            ring.WaitFull();
          }
          if (id >= 0) {
            const std::uint32_t piece = stage + L::kXBytes + group * L::kPieceOfW;
            const int depth = p.in_features - chunk * kChunk - part * kRowElements<T>;
            if (depth < kRowElements<T>) {
              ClearBeyond<T, kTranspose>(piece, depth);
              FenceForCopies();
              SyncWarpgroup(warp / 4 + 1);
            }
            const std::uint64_t x = OperandDescriptor(stage), w = OperandDescriptor(piece);
            FenceProducts();
#pragma unroll
            for (int k = 0; k < kProducts; ++k) {
              MultiplyShared<T, !kTranspose>(sum, w + k * (kTranspose ? kDepthStepKMajor : kDepthStepMNMajor),
                                             x + k * kDepthStepKMajor);
            }
            CommitProducts();
            WaitForProducts<1>();  // these run on, the last ones are over
            release();
            held = ring.empty();
          } else {
            arrive(ring.empty());
          }
          ring.Advance();
        }
      }
      if (others_steps >= 0) {
        PassTurn<L::kConsumers>(L::kTurnBarrier + 1 - team);
        ring.Skip(others_steps * kParts<T>);
      }
      const float2 biases = writer.LoadBiases(tile);
      WaitForProducts<0>();
      KeepRegisters(sum);
      release();
      writer.Write(sum, biases, tile, tile.token + rank * L::kTokens, ring, stages, L::kStageBytes, arrive);
      tile = following;
    }
    writer.Finish();
    __syncwarp();
  }
  // A CTA must not leave while the other one of its cluster signals its barriers.
  if constexpr (kCluster > 1) SyncCluster();
}

template <typename T, int kBlock, bool kTranspose, int kTileTokens, int kCluster>
cudaError_t LaunchLarge(const MatmulParams& params, cudaStream_t stream) {
  using L = LargeTile<T, kBlock, kTileTokens>;
  // The scale's stages would have to be full before a team hands over to the other.
  if (L::kTeams > 1 && params.epilogue.scale != nullptr) return cudaErrorInvalidValue;
  KernelParams p;
  cudaError_t error = FillParams<T>(params, L::kTokens, kGroup, &p);
  if (error != cudaSuccess) return error;
  p.token_tiles = static_cast<unsigned>(CeilDiv(p.token_tiles, kCluster));
  p.capacity = 0;
  p.stages = L::kStages;
  const std::uint64_t rows = static_cast<std::uint64_t>(params.nnz) * kBlock;
  error = EncodeTensorMap(&p.w, {params.data, kFactorMapType<T>, sizeof(T), kBlock, rows,
                                 static_cast<std::uint64_t>(params.data_batch), kGroup});
  if (error != cudaSuccess) return error;
  return WithFusing<T>(p.epilogue, [&](auto fuses) {
    constexpr auto kKernel = MatmulLargeKernel<T, kBlock, kTranspose, kTileTokens, kCluster, decltype(fuses)::value>;
    return LaunchPersistent<kKernel, kCluster, false>(p, params.sms, L::kThreads, L::kSharedBytes, stream);
  });
}

}  // namespace jax_blocksparse::sm90
