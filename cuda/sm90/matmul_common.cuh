// What the two matmul kernels share: the order of tiles, the ring of stages, looking ahead in the plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../launch.cuh"
#include "element.cuh"
#include "matmul.h"
#include "ptx.cuh"
#include "ring.cuh"
#include "tensor_map.h"

namespace jax_blocksparse::sm90 {

constexpr int kMaxStages = 16;
constexpr int kPieceTokens = 32;  // of y, for one store
constexpr int kPieceBytes = kPieceTokens * kRowBytes;
constexpr int kProducers = 2;          // warps: one takes too long for a step of which it has little to copy
constexpr int kProducerThreads = 128;  // registers are handed over by whole warpgroups; the other warps do not work
// What is handed over comes out of what the CTA got at its launch: as many a thread as its size allows, in eights.
constexpr int ProducerRegisters(int warpgroups) { return warpgroups > 2 ? 32 : 56; }
constexpr int ConsumerRegisters(int warpgroups) {
  const int threads = warpgroups * 128 + kProducerThreads;
  const int at_launch = 65536 / threads / 8 * 8 * threads;
  return (at_launch - kProducerThreads * ProducerRegisters(warpgroups)) / (warpgroups * 128) / 8 * 8;
}

// The rows of 128 bytes that a chunk of x takes, and the products along each.
template <typename T>
constexpr int kParts = kChunk / kRowElements<T>;
constexpr int kProducts = kRowBytes / kDepthBytes;

struct KernelParams {
  CUtensorMap x;
  CUtensorMap x_halves;  // small blocks of 16-bit elements
  CUtensorMap y;
  CUtensorMap scale;  // of the epilogue, as its slope
  CUtensorMap slope;
  CUtensorMap w;       // large blocks
  const void* packed;  // small blocks
  Epilogue epilogue;
  const std::int32_t* tiles;
  const std::int32_t* steps;
  const std::int32_t* masks;
  std::int64_t plan_batch_stride;
  unsigned batch, token_tiles, feature_tiles;
  unsigned band;      // feature tiles
  unsigned rotation;  // feature tiles; 0 if rounds and rows do not fit, see TileList
  int tokens, in_features, out_features;
  int nnz;
  int max_steps;
  int capacity;
  int stages;
  bool x_shared, w_shared;
  bool f32_output;
};

// A tile of y, as a group of its features sees it. It is valid if steps >= 0.
struct Tile {
  const std::uint32_t* panels;  // of each group two, of 16 bits
  std::uint32_t own;            // those of the group
  int token, batch;
  int first_step, steps;

  // The first feature of a group's panel. What a plan says may lie beyond y: nothing is stored there.
  static __device__ int FeatureOf(std::uint32_t panels, int panel) {
    return static_cast<int>(panels >> panel * 16 & 0xffff) * kPanel;
  }
};

// Step `i` of a tile, which must have it.
__device__ __forceinline__ const int4* StepOf(const KernelParams& p, const Tile& tile, int i) {
  return reinterpret_cast<const int4*>(p.steps + tile.batch * p.plan_batch_stride) + tile.first_step + i;
}

// The tiles of one CTA (or cluster), of kTokens tokens each, as a group of their features sees them: one in each round.
// CTAs that run together share tokens, so that x is read from memory once, and W comes from L2: if it is too large for
// that, a band of feature tiles at a time.
//
// The tiles of the same tokens are a row; in the plan they go from most work to least. Where rounds can be made of
// whole rows, or rows of whole rounds, at hardly a round more, they are: then CTAs that share tokens are neighbours on
// the chip, and L2 serves many of their copies at once. Every other round, or row if that is longer, takes the tiles
// backwards: who had much work has little next. So CTAs stay together, and find in L2 what others have read, and heavy
// tiles, which read, alternate with light ones, which write. From one such pair to the next, tiles are rotated, so that
// all CTAs have done the same in the end. Where rounds and rows do not fit, every other round goes through the CTAs
// backwards, to a similar end.
template <int kTokens>
class TileList {
 public:
  __device__ TileList(const KernelParams& p, unsigned worker, unsigned workers, int group)
      : p_(p), worker_(worker), workers_(workers), group_(group) {}

  __device__ Tile Load(int round) const {
    const unsigned per_batch = p_.token_tiles * p_.feature_tiles;
    const bool backwards = p_.rotation == 0 && round % 2 != 0;
    const unsigned index = round * workers_ + (backwards ? workers_ - 1 - worker_ : worker_);
    Tile tile{nullptr, 0, 0, 0, 0, -1};
    if (index >= per_batch * p_.batch) return tile;
    tile.batch = p_.batch == 1 ? 0 : index / per_batch;
    unsigned rest = index - tile.batch * per_batch;
    const unsigned first = p_.band == p_.feature_tiles ? 0 : rest / (p_.band * p_.token_tiles) * p_.band;
    const unsigned width = min(p_.band, p_.feature_tiles - first);
    rest -= first * p_.token_tiles;
    tile.token = rest / width * kTokens;
    const int4* entries = reinterpret_cast<const int4*>(p_.tiles + tile.batch * p_.plan_batch_stride);
    const int4* entry = entries + (first + (p_.rotation == 0 ? rest % width : Rotated(rest % width, index))) * 2;
    tile.panels = reinterpret_cast<const std::uint32_t*>(entry);
    tile.own = __ldg(tile.panels + group_);
    const int4 steps = __ldg(entry + 1);
    tile.first_step = max(0, min(steps.x, p_.max_steps));
    tile.steps = max(0, min(steps.y, p_.max_steps - tile.first_step));
    return tile;
  }

 private:
  __device__ unsigned Rotated(unsigned place, unsigned index) const {
    const unsigned turn = index / max(workers_, p_.band);
    place = (place + turn / 2 % p_.band * p_.rotation) % p_.band;
    return turn % 2 == 0 ? place : p_.band - 1 - place;
  }

  const KernelParams& p_;
  unsigned worker_, workers_;
  int group_;
};

// Keeps the compiler from computing a value anew at each use.
__device__ __forceinline__ std::uint32_t Opaque(std::uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ float Opaque(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

using Ring = StageRing<kMaxStages>;

// The work of a warp that copies, one of kProducers: calls copy(tile, step, stage of the step, ring) in one lane when
// that stage is empty, and after a tile's last step does the same with copy_scale(tile, warpgroup, ring), if there is a
// scale. A stage is always filled by the same warp: another one could take the barrier's phase for the last but one.
// The warp stays converged: shuffles in a warp that is not cost several times as much, and products wait for this warp.
template <int kStagesOfStep, bool kFuses, typename Tiles, typename Copy, typename CopyScale>
__device__ __forceinline__ void Produce(const KernelParams& p, const Tiles& tiles, Ring ring, int lane, int producer,
                                        int warpgroups, const Copy& copy, const CopyScale& copy_scale) {
  const auto is_own = [&] { return ring.stage() % kProducers == producer; };
  const auto load = [&](const Tile& tile, int first) {
    const int i = first + lane;
    return i < tile.steps ? __ldg(StepOf(p, tile, i)) : int4{};
  };
  Tile tile = tiles.Load(0);
  int4 next = load(tile, 0);
  for (int round = 1; tile.steps >= 0; ++round) {
    const Tile following = tiles.Load(round);
    if (tile.steps == 0) next = load(following, 0);
    for (int first = 0; first < tile.steps; first += 32) {
      const int4 window = next;  // a step in each lane
      next = first + 32 < tile.steps ? load(tile, first + 32) : load(following, 0);
      const int count = min(32, tile.steps - first);
      for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int stage = 0; stage < kStagesOfStep; ++stage) {
          if (is_own()) {
            const int4 step = {__shfl_sync(kAllLanes, window.x, i), __shfl_sync(kAllLanes, window.y, i),
                               __shfl_sync(kAllLanes, window.z, i), __shfl_sync(kAllLanes, window.w, i)};
            ring.WaitEmpty();
            if (lane == 0) copy(tile, step, stage, ring);
            __syncwarp();
          }
          ring.Advance();
        }
      }
    }
    for (int group = 0; group < (kFuses && p.epilogue.scale != nullptr ? warpgroups : 0); ++group) {
      if (is_own()) {
        ring.WaitEmpty();
        if (lane == 0) copy_scale(tile, group, ring);
        __syncwarp();
      }
      ring.Advance();
    }
    tile = following;
  }
}

// Shared memory: the stages, then a piece of y for each warpgroup.
constexpr int kMaxSharedBytes = 227 * 1024 - 512;  // besides the barriers
constexpr int kAlignment = 1024;                   // of what tensor copies with this swizzle touch

constexpr int StagesThatFit(int stage_bytes, int other_bytes) {
  return std::min(kMaxStages, (kMaxSharedBytes - kAlignment - other_bytes) / stage_bytes);
}

// Where a 16-byte piece of a row of 64 or 128 bytes lies, swizzled as tensor copies do.
template <int kBytesOfRow = kRowBytes>
__device__ __forceinline__ std::uint32_t Swizzled(int row, int piece) {
  static_assert(kBytesOfRow == 64 || kBytesOfRow == 128);
  return row * kBytesOfRow + ((piece ^ (kBytesOfRow == 64 ? row >> 1 & 3 : row & 7)) << 4);
}

// x, copied for this many tokens at a time.
template <typename T>
TensorMapSpec XMapSpec(const MatmulParams& from, int tile_tokens) {
  const auto extent = [](std::int64_t size) { return static_cast<std::uint64_t>(size); };
  return {from.x,
          kFactorMapType<T>,
          sizeof(T),
          extent(from.in_features),
          extent(from.tokens),
          extent(from.x_batch),
          static_cast<std::uint32_t>(tile_tokens)};
}

// Fills in what both kernels need, all but x_halves, w, capacity and stages.
template <typename T>
cudaError_t FillParams(const MatmulParams& from, int tile_tokens, int stored_features, KernelParams* to) {
  const auto extent = [](std::int64_t size) { return static_cast<std::uint64_t>(size); };
  cudaError_t error = EncodeTensorMap(&to->x, XMapSpec<T>(from, tile_tokens));
  if (error != cudaSuccess) return error;
  const TensorMapSpec y = {from.y,
                           from.f32_output ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : kFactorMapType<T>,
                           from.f32_output ? 4u : 2u,
                           extent(from.out_features),
                           extent(from.tokens),
                           extent(from.batch),
                           kPieceTokens,
                           from.f32_output ? kRowBytes : stored_features * 2u};
  if (error = EncodeTensorMap(&to->y, y); error != cudaSuccess) return error;
  if (TensorMapSpec slope = y; from.epilogue.slope != nullptr) {
    slope.array = from.epilogue.slope;
    if (error = EncodeTensorMap(&to->slope, slope); error != cudaSuccess) return error;
  }
  if (TensorMapSpec scale = y; from.epilogue.scale != nullptr) {
    scale.array = from.epilogue.scale;
    scale.batch = from.epilogue.scale_batch_stride == 0 ? 1 : y.batch;
    scale.box_rows = static_cast<std::uint32_t>(tile_tokens);  // it fills the room of a chunk of x
    if (error = EncodeTensorMap(&to->scale, scale); error != cudaSuccess) return error;
  }

  to->tiles = from.tiles;
  to->steps = from.steps;
  to->masks = from.masks;
  to->plan_batch_stride = from.plan_batch_stride;
  to->batch = static_cast<unsigned>(from.batch);
  to->token_tiles = static_cast<unsigned>(CeilDiv(from.tokens, tile_tokens));
  to->feature_tiles = static_cast<unsigned>(CeilDiv(from.out_features, from.tile_features));
  if (from.batch * to->token_tiles * to->feature_tiles > INT32_MAX) return cudaErrorInvalidValue;
  constexpr std::int64_t kBandBytes = 20 << 20;  // less than half of L2
  const std::int64_t w_bytes =
      std::max<std::int64_t>(1, std::int64_t{from.nnz} * from.block * from.block * int{sizeof(T)});
  const std::int64_t bands = std::min<std::int64_t>(CeilDiv(w_bytes, kBandBytes), to->feature_tiles);
  to->band = static_cast<unsigned>(CeilDiv(to->feature_tiles, bands));
  to->epilogue = from.epilogue;
  to->tokens = static_cast<int>(from.tokens);
  to->in_features = from.in_features;
  to->out_features = from.out_features;
  to->nnz = from.nnz;
  to->max_steps = from.max_steps;
  to->x_shared = from.x_batch == 1;
  to->w_shared = from.data_batch == 1;
  to->f32_output = from.f32_output;
  return cudaSuccess;
}

// Divides the tiles among at most this many CTAs or clusters, see TileList. Returns how many get any.
inline std::int64_t DivideTiles(KernelParams* p, std::int64_t workers) {
  const std::int64_t tiles = std::int64_t{p->batch} * p->token_tiles * p->feature_tiles;
  workers = std::min(workers, tiles);
  p->rotation = 0;
  const std::int64_t rounds = CeilDiv(tiles, workers);
  std::int64_t aligned = workers;
  while (aligned % p->band != 0 && p->band % aligned != 0) --aligned;
  if (p->feature_tiles % p->band != 0 || CeilDiv(tiles, aligned) > rounds + rounds / 32) return workers;
  const std::int64_t pairs = std::max<std::int64_t>(1, tiles / std::max<std::int64_t>(aligned, p->band) / 2);
  p->rotation = static_cast<unsigned>(std::max<std::int64_t>(1, p->band / pairs));
  return aligned;
}

// One CTA for each SM, or not many less, in clusters of kCluster. A kernel that follows packing, and waits for it
// itself, begins when the last CTA of that has left, which spares it a microsecond or two. It must not begin earlier:
// CTAs would be placed as SMs become free, away from those whose copies of x coincide with their own.
template <auto kKernel, int kCluster, bool kFollowsPacking>
cudaError_t LaunchPersistent(KernelParams params, int sms, int threads, int shared_bytes, cudaStream_t stream) {
  if (const cudaError_t error = AllowSharedMemory<kKernel>(kMaxSharedBytes); error != cudaSuccess) return error;
  static_assert(kCluster == 1 || !kFollowsPacking, "there is one attribute");
  cudaLaunchAttribute attribute = {};
  if constexpr (kFollowsPacking) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.attrs = &attribute;
  config.numAttrs = kFollowsPacking || kCluster > 1;  // a cluster of one would be placed like a cluster, too
  config.gridDim = static_cast<unsigned>(DivideTiles(&params, sms / kCluster) * kCluster);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernel, params);
}

// Calls launch(fuses) with a type that says whether the kernel has to have an epilogue. Kernels of floats never do.
template <typename T, typename Launch>
cudaError_t WithFusing(const Epilogue& epilogue, const Launch& launch) {
  if constexpr (!std::is_same_v<T, float>) {
    if (!epilogue.IsIdentity()) return launch(std::true_type{});
  }
  return launch(std::false_type{});
}

}  // namespace jax_blocksparse::sm90
