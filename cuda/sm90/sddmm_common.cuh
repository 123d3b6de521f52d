// What the kernels of sampled products share: reading the plan, the ring of stages, copying, storing the blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "element.cuh"
#include "ptx_sddmm.cuh"
#include "ring.cuh"
#include "sddmm.h"
#include "tensor_map.h"

namespace jax_blocksparse::sm90 {

constexpr int kMaxPanels = 56;  // of a tile; a panel is what a copy has: rows of 128 bytes
constexpr int kCopyWarps = 4;   // one warp cannot issue copies as fast as they can be served
constexpr int kProductWarps = 8;
constexpr int kSddmmThreads = (kProductWarps + kCopyWarps) * 32;
// Registers are handed over from the copying warps, out of what a CTA of so many threads has at its launch.
constexpr int kCopyRegisters = 24, kProductRegisters = 240;
static_assert(kProductRegisters * kProductWarps + kCopyRegisters * kCopyWarps <=
              65536 / kSddmmThreads / 8 * 8 * (kProductWarps + kCopyWarps));
static_assert(kProductWarps % 4 == 0 && kCopyWarps % 4 == 0, "whole warpgroups hand over registers");
constexpr int kMaxStages = 12;
constexpr int kRingBytes = 224 * 1024;
constexpr int kAlignment = 1024;  // of what tensor copies with this swizzle touch
constexpr int kSharedBytes = kRingBytes + kAlignment;
static_assert(kSharedBytes + 1024 <= 227 * 1024, "room for barriers and lists");

// The order in which CTAs, or pairs of them, take tiles of the plan, where a strip's tiles follow each other: some
// strips at a time, of these the first tile of each, then the second. The tiles of one wave of CTAs then need few slabs
// of x and of dy alike, and memory is read less often.
struct TileWalk {
  int strips = 1, tiles = 1;  // at a time, and of a strip

  // The tile that is taken at a place, of so many. Those that do not fill such an area come in the plan's order.
  __device__ int At(int place, int places) const {
    const int area = strips * tiles, group = place / area, within = place % area;
    if (group == places / area) return place;
    return (group * strips + within % strips) * tiles + within / strips;
  }
};

struct SddmmKernelParams {
  CUtensorMap x;
  CUtensorMap dy;
  const int4* tiles;
  const int* slabs;
  const int* slots;
  const int* order;
  const int* places;
  void* data;
  std::int64_t plan_batch_stride;
  int plan_tiles, plan_units;
  int all_tiles;      // plan_tiles, and one more if it takes that to make pairs
  int first_cluster;  // of those that this launch is
  TileWalk walk;
  int split;
  int most_stages;
  bool paired;  // clusters have two tiles, which share copies of dy where they can
  int nnz;
  int block_bits;  // log2 of the block size
  int ratio_bits;  // log2 of the blocks along a unit's side
  int chunks;      // of tokens
  bool x_shared, dy_shared;
  bool f32_output;
};

// What a kernel is built for: factors of type T, units of kUnit features, stages of kTokens tokens.
template <typename T, int kUnit_, int kTokens_>
struct SddmmShape {
  static constexpr int kUnit = kUnit_, kTokens = kTokens_;
  static constexpr int kCapacity = SddmmCapacity(kUnit), kMaxSlabs = SddmmMaxSlabs(kUnit);
  static constexpr int kUnitsOfWarp = kCapacity / kProductWarps;  // where each product warp has units of its own
  static constexpr int kPanel = kRowElements<T>, kSlab = std::max(64, kUnit);  // features
  static constexpr int kPanelsPerSlab = kSlab / kPanel;
  static constexpr int kPanelBytes = kTokens * kRowBytes;
  static constexpr int kSlabBytes = kPanelsPerSlab * kPanelBytes;
  static_assert(kPanelBytes % kAlignment == 0);
  static_assert(2 * kMaxSlabs * kSlabBytes <= kRingBytes, "two stages of the largest tile");
  static_assert(kMaxSlabs * kPanelsPerSlab <= kMaxPanels);
  static_assert(kCapacity * kUnit * kUnit * int{sizeof(float)} <= kRingBytes, "the sums take the place of the stages");
};

// What half of the product warps multiply: slabs of x that follow each other, and which of the slabs of dy. Where units
// are that large, panels of them.
struct SddmmHalf {
  int first, count, dy;
};

// The CTA's tile, and which of its chunks of tokens this CTA takes: the rank-th, and then every split-th.
template <typename Shape>
struct SddmmTile {
  int batch;
  std::int64_t plan;  // where the plan begins, in integers
  int number;         // of the tile in the plan; one that only makes a pair lies beyond, and is empty
  int first_block, last_block;
  int first_unit, units;
  int x_slabs, dy_slabs;
  int x_room;  // slabs of x that a stage has room for
  int rank, split;
  bool shares_dy;  // with the other tile of a pair
  int stages;

  __device__ explicit SddmmTile(const SddmmKernelParams& p) {
    split = p.split;
    const int at_once = p.paired ? 2 : 1, in_cluster = static_cast<int>(ClusterRank());
    const int cluster = p.first_cluster + blockIdx.x / (at_once * split);
    const int places = p.all_tiles / at_once;
    batch = cluster / places;
    plan = batch * p.plan_batch_stride;
    number = p.walk.At(cluster % places, places) * at_once + in_cluster % at_once;
    rank = in_cluster / at_once;
    const int4 tile = Entry(p, number), next = Entry(p, number + 1);
    first_block = Clamp(tile.x, 0, p.nnz);
    last_block = Clamp(next.x, first_block, p.nnz);
    first_unit = Clamp(tile.y, 0, p.plan_units);
    units = Units(p, tile, next);
    x_slabs = XSlabs(tile);
    const int all_dy_slabs = tile.z >> 8 & 0xff;
    dy_slabs = min(all_dy_slabs, Shape::kMaxSlabs - x_slabs);
    x_room = x_slabs;
    shares_dy = false;
    if (p.paired) {  // whatever the plan holds, both CTAs come to the same conclusion
      const int4 other = Entry(p, number ^ 1);
      const int other_units = Units(p, other, Entry(p, (number ^ 1) + 1));
      x_room = max(x_slabs, XSlabs(other));
      shares_dy = tile.w == other.w && tile.z >> 8 == other.z >> 8 && min(x_slabs, XSlabs(other)) > 0 &&
                  min(units, other_units) > 0 && all_dy_slabs > 0 && x_room + all_dy_slabs <= Shape::kMaxSlabs;
      if (!shares_dy) x_room = x_slabs;
    }
    stages = min(p.most_stages, kRingBytes / max(1, stage_bytes()));
  }

  __device__ bool IsEmpty() const { return units == 0 || x_slabs == 0 || dy_slabs == 0; }
  __device__ int slabs() const { return x_slabs + dy_slabs; }
  __device__ int stage_bytes() const { return (x_room + dy_slabs) * Shape::kSlabBytes; }
  __device__ int Chunks(const SddmmKernelParams& p) const { return (p.chunks - rank + split - 1) / split; }

  // Where a unit's x and dy lie in a stage, in units; each is below the number of units in the slabs.
  __device__ int2 Slot(const SddmmKernelParams& p, int unit) const {
    const auto word = static_cast<std::uint32_t>(__ldg(p.slots + plan + first_unit + unit));
    const std::uint32_t most = slabs() * (Shape::kSlab / Shape::kUnit) - 1;
    const std::uint32_t shift = (x_room - x_slabs) * (Shape::kSlab / Shape::kUnit);
    return {static_cast<int>(min(word & 0xffff, most)), static_cast<int>(min(word >> 16, most) + shift)};
  }

  // For units of 64, called by whole warps. A tile with units of two columns is divided between these.
  __device__ SddmmHalf Half(const SddmmKernelParams& p, int half) const {
    int of_first = (x_slabs + 1) / 2;
    const bool two_columns = dy_slabs > 1;
    if (two_columns) {
      const int lane = threadIdx.x % 32;
      of_first = __popc(__ballot_sync(kAllLanes, lane < x_slabs && Slot(p, lane).y == x_room));
    }
    const int first = half == 0 ? 0 : of_first, count = half == 0 ? of_first : x_slabs - of_first;
    return {first, min(count, Shape::kCapacity / 2), two_columns ? half : 0};
  }

 private:
  static __device__ int Clamp(int value, int least, int most) { return max(least, min(value, most)); }
  __device__ int4 Entry(const SddmmKernelParams& p, int tile) const {
    return __ldg(p.tiles + plan / 4 + min(tile, p.plan_tiles));
  }
  static __device__ int Units(const SddmmKernelParams& p, const int4& tile, const int4& next) {
    const int first = Clamp(tile.y, 0, p.plan_units);
    return Clamp(next.y, first, min(p.plan_units, first + Shape::kCapacity)) - first;
  }
  static __device__ int XSlabs(const int4& tile) {
    return Clamp(tile.z & 0xff, 0, std::min(Shape::kMaxSlabs - 1, Shape::kCapacity));
  }
};

using SddmmRing = StageRing<kMaxStages>;

// Shared memory besides the ring.
struct SddmmShared {
  std::uint64_t barriers[2 * kMaxStages];
  int features[kMaxPanels];  // the first feature of each panel of a stage
};

// Tells those who copy that this warp no longer reads a stage.
template <typename Shape>
__device__ __forceinline__ void HandBack(const SddmmTile<Shape>& tile, std::uint32_t empty) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) Arrive(empty);
  if (lane == 1 && tile.shares_dy) ArriveAt(empty, ClusterRank() ^ 1);
}

// For a product warp: calls multiply(stage) with the address of one stage after the other and hands each back.
// Afterwards nobody reads the stages any more.
template <typename Shape, typename Multiply>
__device__ __forceinline__ void ForEachStage(const SddmmKernelParams& p, const SddmmTile<Shape>& tile, SddmmRing ring,
                                             std::uint32_t stages, const Multiply& multiply) {
  for (int chunk = tile.Chunks(p); chunk > 0; --chunk) {
    ring.WaitFull();
    multiply(stages + ring.stage() * tile.stage_bytes());
    __syncwarp();
    HandBack(tile, ring.empty());
    ring.Advance();
  }
  SyncThreads(1, kProductWarps * 32);
}

// Where each product warp has units of its own: calls multiply(units, depths) with two integral constants, how many
// units a warp of a tile of so many has at most, and how many products along the tokens it takes of each before it goes
// on to the next. Two are faster, if there are registers for the fragments of both.
template <typename Shape, typename Multiply>
__device__ __forceinline__ void WithUnitsAndDepths(int units, const Multiply& multiply) {
  static_assert(Shape::kCapacity % kProductWarps == 0);
  constexpr int kFew = 4;
  if constexpr (Shape::kUnit == 16) {
    multiply(std::integral_constant<int, Shape::kUnitsOfWarp>{}, std::integral_constant<int, 2>{});
  } else if (units <= kFew * kProductWarps) {
    multiply(std::integral_constant<int, kFew>{}, std::integral_constant<int, 2>{});
  } else {
    multiply(std::integral_constant<int, Shape::kUnitsOfWarp>{}, std::integral_constant<int, 1>{});
  }
}

// One of the kCopyWarps warps copies its share of every stage.
template <typename Shape>
__device__ void CopyStages(const SddmmKernelParams& p, const SddmmTile<Shape>& tile, const SddmmShared& shared,
                           std::uint32_t ring_bytes, int warp) {
  if (threadIdx.x % 32 != 0) return;
  SddmmRing ring(SharedAddress(shared.barriers), tile.stages);
  const int x_panels = tile.x_slabs * Shape::kPanelsPerSlab, panels = tile.slabs() * Shape::kPanelsPerSlab;
  const int x_batch = p.x_shared ? 0 : tile.batch, dy_batch = p.dy_shared ? 0 : tile.batch;
  for (int chunk = tile.rank; chunk < p.chunks; chunk += tile.split) {
    const std::uint32_t to = ring_bytes + ring.stage() * tile.stage_bytes();
    const int token = chunk * Shape::kTokens;
    ring.WaitEmpty();
    if (warp == 0) {
      ArriveExpecting(ring.full(), tile.slabs() * Shape::kSlabBytes);
    } else {
      Arrive(ring.full());
    }
    int panel = warp;
    for (; panel < x_panels; panel += kCopyWarps) {
      LoadTensor(to + panel * Shape::kPanelBytes, &p.x, shared.features[panel], token, x_batch, ring.full());
    }
    const std::uint32_t to_dy = to + (tile.x_room - tile.x_slabs) * Shape::kSlabBytes;
    for (; panel < panels; panel += kCopyWarps) {
      const std::uint32_t at = to_dy + panel * Shape::kPanelBytes;
      const int feature = shared.features[panel];
      if (!tile.shares_dy) {
        LoadTensor(at, &p.dy, feature, token, dy_batch, ring.full());
      } else if ((panel - x_panels + chunk) % 2 == tile.number % 2) {  // the CTAs take turns
        LoadTensorMulticast(at, &p.dy, feature, token, dy_batch, ring.full(), 0b11 << 2 * tile.rank);
      }
    }
    ring.Advance();
  }
}

// ---- Sums in shared memory: units of kUnit x kUnit floats, one after the other ----

// The byte at which a float of a unit lies. Eights of a row are permuted so that the sums that a warp writes at a time,
// two neighbours in each of several rows, fall into different banks.
template <int kUnit>
__device__ __forceinline__ int SumOffset(int row, int col) {
  const int line = kUnit == 16 ? row >> 1 & 1 : kUnit == 32 ? row & 3 : row >> 1 & 3;
  return (row * kUnit + (col ^ line << 3)) * 4;
}

template <typename T>
__device__ __forceinline__ void StoreFour(T* to, const float4& four) {
  *reinterpret_cast<uint2*>(to) = uint2{Pack<T>(four.x, four.y), Pack<T>(four.z, four.w)};
}
__device__ __forceinline__ void StoreFour(float* to, const float4& four) { *reinterpret_cast<float4*>(to) = four; }

// Adds up, in the order of ranks, what the CTAs of the cluster have for this CTA's share of the tile's blocks, and
// writes them. All product warps work on all blocks, four neighbouring elements a lane; what several of them need from
// memory is asked for at once, for the first of them before sync() says that all sums are there.
template <typename Shape, bool kSplit, typename Out, typename Sync>
__device__ __forceinline__ void StoreBlocks(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                            std::uint32_t sums, Out* data, const Sync& sync) {
  constexpr int kUnitBytes = Shape::kUnit * Shape::kUnit * 4, kThreads = kProductWarps * 32, kAtOnce = 8;
  const int row_bits = p.block_bits - 2, item_bits = p.block_bits + row_bits;  // items of a row and of a block
  const int at_once = p.paired ? 2 : 1, first_cta = ClusterRank() % at_once;   // whose sums are of this tile
  const int blocks = (tile.last_block - tile.first_block - tile.rank + tile.split - 1) / tile.split;
  const int items = blocks << item_bits, ratio = (1 << p.ratio_bits) - 1;
  data += static_cast<std::int64_t>(tile.batch) * p.nnz << item_bits + 2;
  int block[kAtOnce];
  std::uint32_t where[kAtOnce];
  const auto look_up = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int item = first + i * kThreads;
      const std::int64_t at = tile.plan + tile.first_block + tile.rank + (item >> item_bits) * tile.split;
      block[i] = item < items ? __ldg(p.order + at) : -1;
      where[i] = item < items ? static_cast<std::uint32_t>(__ldg(p.places + at)) : 0;
    }
  };
  look_up(threadIdx.x);
  sync();
  for (int first = threadIdx.x; first < items; first += kAtOnce * kThreads) {
    if (first >= kAtOnce * kThreads) look_up(first);
    float4 sum[kAtOnce] = {};
    for (int rank = 0; rank < (kSplit ? tile.split : 1); ++rank) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * kThreads & (1 << item_bits) - 1;
        const int unit = min(static_cast<int>(where[i] & 0xff), Shape::kCapacity - 1);
        const int unit_row = (where[i] >> 8 & ratio) << p.block_bits | item >> row_bits;
        const int unit_col = (where[i] >> 12 & ratio) << p.block_bits | (item & (1 << row_bits) - 1) * 4;
        const std::uint32_t address = sums + unit * kUnitBytes + SumOffset<Shape::kUnit>(unit_row, unit_col);
        const float4 part = kSplit ? LoadOfCluster16(address, first_cta + rank * at_once) : LoadShared16(address);
        sum[i] = {sum[i].x + part.x, sum[i].y + part.y, sum[i].z + part.z, sum[i].w + part.w};
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (block[i] < 0 || block[i] >= p.nnz) continue;
      const int item = first + i * kThreads & (1 << item_bits) - 1;
      const int row = item >> row_bits, four = item & (1 << row_bits) - 1;
      const bool exists = row < (where[i] >> 16 & 31) * 8 && four < (where[i] >> 21 & 31) * 2;
      StoreFour(data + ((static_cast<std::int64_t>(block[i]) << item_bits | item) << 2), exists ? sum[i] : float4{});
    }
  }
}

// Zeroes the inert blocks; all CTAs of a batch element share the work.
template <typename Shape, typename Out>
__device__ void ZeroInert(const SddmmKernelParams& p, const SddmmTile<Shape>& tile, Out* data) {
  const int live = max(0, __ldg(&p.tiles[tile.plan / 4 + p.plan_tiles].x));
  const int area = 1 << 2 * p.block_bits, ctas = p.plan_tiles * p.split;
  for (std::int64_t i = std::int64_t{live} + tile.number * p.split + tile.rank; i < p.nnz; i += ctas) {
    const int block = __ldg(p.order + tile.plan + i);
    if (block < 0 || block >= p.nnz) continue;
    Out* to = data + (static_cast<std::int64_t>(tile.batch) * p.nnz + block) * area;
    for (int item = threadIdx.x; item < area / 4; item += blockDim.x) StoreFour(to + item * 4, float4{});
  }
}

// What both kernels are made of. `Consumers` multiplies every stage and puts the sums into
// shared memory.
template <typename T, typename Consumers>
__device__ __forceinline__ void RunSddmm(const SddmmKernelParams& p) {
  using Shape = typename Consumers::Shape;
  extern __shared__ unsigned char dynamic[];
  __shared__ SddmmShared shared;

  // All that has to come from memory before the first copy, asked for at once.
  const SddmmTile<Shape> tile(p);
  if (threadIdx.x < 2) PrefetchTensorMap(threadIdx.x == 0 ? &p.x : &p.dy);
  if (const int panel = threadIdx.x; panel < Shape::kMaxSlabs * Shape::kPanelsPerSlab) {
    const int number = min(tile.number, p.plan_tiles - 1);
    const int slab = __ldg(p.slabs + tile.plan + number * Shape::kMaxSlabs + panel / Shape::kPanelsPerSlab);
    shared.features[panel] = slab * Shape::kSlab + panel % Shape::kPanelsPerSlab * Shape::kPanel;
  }
  if (threadIdx.x == 0) {
    SddmmRing::Init(SharedAddress(shared.barriers), kMaxStages, kCopyWarps, kProductWarps * (tile.shares_dy ? 2 : 1));
  }
  if (p.f32_output) {
    ZeroInert(p, tile, static_cast<float*>(p.data));
  } else {
    ZeroInert(p, tile, static_cast<T*>(p.data));
  }
  if (tile.IsEmpty()) return;

  const std::uint32_t ring_bytes = (SharedAddress(dynamic) + kAlignment - 1) & ~(kAlignment - 1);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (tile.shares_dy) {
    SyncCluster();
  } else {
    __syncthreads();
  }

  if (warp >= kProductWarps) {
    ShrinkRegisters<kCopyRegisters>();
    CopyStages<Shape>(p, tile, shared, ring_bytes, warp - kProductWarps);
    return;
  }
  GrowRegisters<kProductRegisters>();
  for (int i = tile.first_block + threadIdx.x * 32; i < tile.last_block; i += kProductWarps * 32 * 32) {
    Prefetch(p.order + tile.plan + i);
    Prefetch(p.places + tile.plan + i);
  }
  Consumers::Multiply(p, tile, SddmmRing(SharedAddress(shared.barriers), tile.stages), ring_bytes, warp);
  const auto sync = [&] {
    if (tile.split > 1) {
      SyncCluster();
    } else {
      SyncThreads(1, kProductWarps * 32);
    }
  };
  const auto store = [&](auto* data) {
    if (tile.split == 1) {
      StoreBlocks<Shape, false>(p, tile, ring_bytes, data, sync);
    } else {
      StoreBlocks<Shape, true>(p, tile, ring_bytes, data, sync);
    }
  };
  if (p.f32_output) {
    store(static_cast<float*>(p.data));
  } else {
    store(static_cast<T*>(p.data));
  }
  if (tile.split > 1 || tile.shares_dy) SyncCluster();  // none leaves while another reads its sums or signals to it
}

}  // namespace jax_blocksparse::sm90
