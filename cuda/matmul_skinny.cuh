// y = x W and dx = dy W^T for few tokens, on tensor cores by mma.sync, for 16-bit elements and all block sizes.
//
// Here the weights are read once and used for a handful of products, so everything serves to keep many bytes of them
// on their way. A CTA computes a slice: up to 32 output features (a block column, or a part of a wide one) of up to 64
// tokens. Each of its warps works alone: it takes every n-th unit of the column's list and copies the units' weights
// (cp.async) three units ahead into a ring of its own; no two warps meet before the end, when they add up their sums in
// a fixed order. A unit is 32 deep: a part of a block, one of 32, two of 16 or four of 8. x goes from global memory
// into registers in fragment order: the depths of a unit are numbered such that a lane's eight are neighbours in
// memory, and W is laid out to match. What bounds it: up to 32 tokens DRAM, or for a short list its latencies (the
// lists, then the weights, then the sums); for 64 tokens x, of which a block of b features needs 128 b bytes from L2
// for its 2 b^2 bytes of weights, in pieces of 2 b bytes, as far as L1 has forgotten it.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels.h"
#include "launch.cuh"
#include "mma_tile.cuh"

namespace jax_blocksparse {

constexpr int kUnitDepth = 32;
constexpr int kDepthSteps = kUnitDepth / 16;  // mma.sync instructions along the depth
constexpr int kMaxSplits = 12;                // warps of a CTA

template <int kBlock_, int kTokens_>
struct SkinnyTile {
  static constexpr int kBlock = kBlock_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kPiece = std::min(kBlock, kUnitDepth);  // a unit holds square pieces of this side
  static constexpr int kPieces = kUnitDepth / kPiece;          // of different blocks, side by side in depth
  static constexpr int kParts = kBlock / kPiece;               // units along the depth of a block
  static constexpr int kSlices = kBlock / kPiece;              // CTAs along the features of a block column

  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kFeatureTiles = std::max(1, kPiece / 16);
  static constexpr int kFragments = kTokenTiles * kFeatureTiles;  // of 16 features x 8 tokens
  static constexpr int kHalves = std::min(2, kPiece / 8);         // of a fragment; blocks of 8 use the first alone
  static constexpr int kPairs = kFragments * kHalves * 32;        // of sums of neighbouring tokens

  static constexpr int kUnitBytes = kUnitDepth * kPiece * 2;
  static constexpr int kStages = 4;
  static constexpr int kAhead = kStages - 1;
  static constexpr int kRingBytes = kStages * kUnitBytes;  // of one warp
  static constexpr int kMaxSharedBytes = kMaxSplits * kRingBytes;

  // The sums and a unit's x take most of them. More would mean fewer warps, and so fewer bytes on their way.
  static constexpr int kRegisters = kTokens < 64 ? 80 : kPiece < 32 ? 128 : 168;
  static constexpr int kWarpsPerSm = 65536 / 32 / kRegisters;

  static_assert(kTokens % 8 == 0 && kTokenTiles <= 32 && (kStages & (kStages - 1)) == 0);
  static_assert(kPairs * int{sizeof(float2)} <= kRingBytes, "a warp leaves its sums in its ring");
  static_assert(kUnitBytes % (16 * 32) == 0, "all lanes copy equally often");
  static_assert(kRegisters * 32 * kMaxSplits <= 65536, "the largest CTA fits");
  static_assert(kMaxSharedBytes <= 98 * 1024, "the largest that every architecture since sm_80 allows, and some left");
};

// How the weights of a unit lie in shared memory, how they get there, and from there into fragments.
//
// Depth k of a unit, k = 8 t + 4 j + 2 h + e with t < 4 and j, h, e < 2, is element e of the register h that lane t of
// each group of four holds for product j. So a lane needs eight successive k of x; of W, for dy W^T, as well. For x W
// the rows are stored in the order (j, h, t, e), in which ldmatrix.trans takes them.
template <int kPiece, bool kTranspose>
struct UnitLayout {
  // All lanes copy kCopies chunks, lane after lane along the rows of a piece, and each time eight rows further down.
  static constexpr int kLanes = 32 * kPiece / kUnitDepth;  // for one piece
  static constexpr int kRowChunks = kPiece / kChunk;
  static constexpr int kCopies = kPiece / 8;
  static_assert(kLanes == 8 * kRowChunks);

  // Where the lane's first chunk goes, and from there the i-th one: of x W eight rows further down is the next t.
  static __device__ __forceinline__ std::uint32_t CopyOffset(int lane) {
    const int piece = lane / kLanes, row = lane % kLanes / kRowChunks, chunk = lane % kRowChunks;
    if constexpr (kTranspose) return row * (kUnitDepth * 2) + (piece * kRowChunks + chunk) * 16;
    const int k = piece * kPiece + row, t = k / 8, j = k / 4 % 2, h = k / 2 % 2, e = k % 2;
    return TileOffset<kPiece>(16 * j + 8 * h + 2 * t + e, chunk);
  }
  static __device__ __forceinline__ std::uint32_t CopyStep(std::uint32_t offset, int i) {
    if constexpr (kTranspose) return offset + i * (8 * kUnitDepth * 2);
    return (kPiece == 32 ? offset ^ (i * 16) : offset) + i * (2 * kPiece * 2);
  }

  // The left operands of the products for 16 features, or for the 8 of a small piece.
  static __device__ __forceinline__ void Load(std::uint32_t (&a)[kDepthSteps][4], std::uint32_t unit, int feature16,
                                              int lane) {
    static_assert(kDepthSteps == 2);
    if constexpr (kTranspose) {
      const std::uint32_t row = unit + (16 * feature16 + lane / 4) * (kUnitDepth * 2) + lane % 4 * 16;
      const uint4 low = LoadShared16(row);
      const uint4 high = kPiece == 8 ? make_uint4(0, 0, 0, 0) : LoadShared16(row + 8 * kUnitDepth * 2);
      Set(a[0], low.x, high.x, low.y, high.y);
      Set(a[1], low.z, high.z, low.w, high.w);
    } else if constexpr (kPiece == 8) {
      std::uint32_t words[4];
      LoadMatrices<true>(words, unit + TileOffset<kPiece>(lane, 0));
      Set(a[0], words[0], 0, words[1], 0);
      Set(a[1], words[2], 0, words[3], 0);
    } else {
#pragma unroll
      for (int j = 0; j < kDepthSteps; ++j) {
        LoadMatrices<true>(a[j], unit + TileStep<kPiece>(ChunksFirstOffset<kPiece>(lane), j, feature16));
      }
    }
  }

 private:
  static __device__ __forceinline__ void Set(std::uint32_t (&a)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t a2, std::uint32_t a3) {
    a[0] = a0;
    a[1] = a1;
    a[2] = a2;
    a[3] = a3;
  }
};

// The units of a column's list that one warp works on: unit `share` and every `shares`-th after it.
//
// The 32 lanes hold a window of units and the ids of the following one: order[i] and inner[order[i]] are two dependent
// loads, and the first is issued a window ahead. Entries with an id or a row out of range, and those that fill the last
// unit up, lie behind the end of x.
template <typename Tile>
class UnitWalk {
  static constexpr unsigned kAllLanes = 0xffffffffu;
  static constexpr int kWindow = 32 / Tile::kPieces;
  static constexpr int kNowhere = INT_MAX - kUnitDepth;  // still behind every x when depths of a unit are added

 public:
  struct Unit {
    int id;     // of the block from which this lane copies
    int first;  // where in x its piece starts
  };

  __device__ UnitWalk(const MatmulParams& params, int batch, int column, int share, int shares)
      : params_(params), batch_(batch), lane_(threadIdx.x % 32), share_(share), shares_(shares) {
    const std::int32_t* ptr = params.ptr + batch * params.ptr_batch_stride + column;
    begin_ = max(0, min(__ldg(ptr), params.nnz));
    end_ = max(begin_, min(__ldg(ptr + 1), params.nnz));
    next_id_ = IdAt(UnitOfLane(0));
  }

  // How many units Next() has to give. No memory holds so many blocks that 32 bits would not do for them.
  __device__ int Count() const {
    const int units = (end_ - begin_ + Tile::kPieces - 1) / Tile::kPieces * Tile::kParts;
    return units > share_ ? (units - share_ - 1) / shares_ + 1 : 0;
  }

  __device__ Unit Next() {
    const int head = taken_ % kWindow;
    if (head == 0) {
      id_ = next_id_;
      first_ = FirstOf(id_, UnitOfLane(taken_));
      next_id_ = IdAt(UnitOfLane(taken_ + kWindow));
    }
    ++taken_;
    const int source = head * Tile::kPieces + lane_ / (32 / Tile::kPieces);
    return {__shfl_sync(kAllLanes, id_, source), __shfl_sync(kAllLanes, first_, source)};
  }

 private:
  // Unsigned: may pass the end, and so 2^31, by two windows.
  __device__ std::uint32_t UnitOfLane(int taken) const {
    return share_ + static_cast<std::uint32_t>(taken + lane_ / Tile::kPieces) * shares_;
  }

  __device__ int IdAt(std::uint32_t unit) const {
    const std::uint32_t entry = begin_ + unit / Tile::kParts * Tile::kPieces + lane_ % Tile::kPieces;
    return entry < static_cast<std::uint32_t>(end_) ? __ldg(params_.order + batch_ * params_.order_batch_stride + entry)
                                                    : -1;
  }

  __device__ int FirstOf(int id, std::uint32_t unit) const {
    if (id < 0 || id >= params_.nnz) return kNowhere;
    const int row = __ldg(params_.inner + batch_ * params_.order_batch_stride + id);
    if (row < 0 || row >= (params_.in_features + Tile::kBlock - 1) / Tile::kBlock) return kNowhere;
    return row * Tile::kBlock + static_cast<int>(unit % Tile::kParts) * kUnitDepth;
  }

  const MatmulParams& params_;
  int batch_, lane_, share_, shares_;
  int begin_, end_;
  int taken_ = 0;
  int id_, first_, next_id_;
};

// Which part of y a CTA computes. What runs at the same time shares a block column's weights in L2.
template <typename Tile>
struct SkinnyPosition {
  int batch, column, slice;
  std::int64_t first_token;

  __device__ explicit SkinnyPosition(const MatmulParams& p) {
    const int token_tiles = static_cast<int>(CeilDiv(p.tokens, Tile::kTokens));
    const int columns = static_cast<int>(CeilDiv(p.out_features, Tile::kBlock));
    int index = blockIdx.x;
    first_token = static_cast<std::int64_t>(index % token_tiles) * Tile::kTokens;
    index /= token_tiles;
    slice = index % Tile::kSlices;
    index /= Tile::kSlices;
    column = index % columns;
    batch = index / columns;
  }
};

// The first CTAs have L2 read the operands that are found by way of others, a line a thread, while all wait for ptr.
template <typename T>
__device__ __forceinline__ void PrefetchOperands(const MatmulParams& p) {
  constexpr int kLine = 128;
  const std::int64_t byte = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
  if (byte < p.nnz * std::int64_t{sizeof(*p.order)}) {
    Prefetch(reinterpret_cast<const char*>(p.order) + byte);
    Prefetch(reinterpret_cast<const char*>(p.inner) + byte);
  }
  if (byte < p.tokens * p.in_features * std::int64_t{sizeof(T)}) Prefetch(static_cast<const char*>(p.x) + byte);
}

template <typename T, bool kTranspose, typename Tile>
__global__ void __maxnreg__(Tile::kRegisters) MatmulSkinnyKernel(const __grid_constant__ MatmulParams p) {
  using Layout = UnitLayout<Tile::kPiece, kTranspose>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int firsts[kMaxSplits][Tile::kStages][4];  // where in x the four chunks of a unit are

  PrefetchOperands<T>(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = blockDim.x / 32;
  const SkinnyPosition<Tile> at(p);
  const int tokens = static_cast<int>(min(p.tokens - at.first_token, static_cast<std::int64_t>(Tile::kTokens)));
  const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + (at.first_token + lane / 4) * p.in_features;
  const T* data = static_cast<const T*>(p.data) + at.batch * p.data_batch_stride;
  const std::uint32_t ring = SharedAddress(shared) + warp * Tile::kRingBytes;

  UnitWalk<Tile> walk(p, at.batch, at.column, warp, splits);

  const auto copy_unit = [&](int stage) {
    constexpr int kBlock = Tile::kBlock;
    const auto unit = walk.Next();
    const int depth = p.in_features - unit.first;  // of the piece, as far as it exists
    if (lane % 8 == 0) firsts[warp][stage][lane / 8] = unit.first + lane % Layout::kLanes / 8 * kChunk;
    const int part = unit.first % kBlock / Tile::kPiece;
    const int row = lane % Layout::kLanes / Layout::kRowChunks, element = lane % Layout::kRowChunks * kChunk;
    const T* from = data + static_cast<std::int64_t>(depth > 0 ? unit.id : 0) * (kBlock * kBlock) +
                    (kTranspose ? at.slice * kBlock + part : part * kBlock + at.slice) * Tile::kPiece + row * kBlock +
                    element;
    const std::uint32_t to = ring + stage * Tile::kUnitBytes + Layout::CopyOffset(lane);
#pragma unroll
    for (int i = 0; i < Layout::kCopies; ++i) {
      CopyAsync16(Layout::CopyStep(to, i), from + i * 8 * kBlock,
                  kTranspose            ? ChunkElements(depth, element) * 2
                  : row + i * 8 < depth ? 16
                                        : 0);
    }
  };

  std::uint32_t token_mask = 0;  // bit n: token lane / 4 + 8 * n exists
  for (int n = 0; n < Tile::kTokenTiles; ++n) token_mask |= (lane / 4 + 8 * n < tokens ? 1u : 0u) << n;
  float sums[Tile::kFeatureTiles][Tile::kTokenTiles][4] = {};

  // The first rounds only load; in each later one, a unit is loaded while the oldest one is multiplied.
  const int count = walk.Count();
#pragma unroll 1
  for (int unit = -Tile::kAhead; unit < count; ++unit) {
    constexpr int kStageMask = Tile::kStages - 1;
    __syncwarp();  // no lane reads the unit before any more
    if (unit + Tile::kAhead < count) copy_unit((unit + Tile::kAhead) & kStageMask);
    CommitCopies();
    if (unit < 0) continue;

    const int first = firsts[warp][unit & kStageMask][lane % 4];
    const std::uint32_t exist = first < p.in_features ? token_mask : 0;
    const T* from = x + first;
    uint4 b[Tile::kTokenTiles];
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
      b[n] = (exist >> n & 1) != 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
      from += static_cast<std::int64_t>(8) * p.in_features;
    }
    WaitForCopies<Tile::kAhead>();
    __syncwarp();  // the unit has landed
#pragma unroll
    for (int m = 0; m < Tile::kFeatureTiles; ++m) {
      std::uint32_t a[kDepthSteps][4];
      Layout::Load(a, ring + (unit & kStageMask) * Tile::kUnitBytes, m, lane);
#pragma unroll
      for (int n = 0; n < Tile::kTokenTiles; ++n) {
        MultiplyAdd<T>(sums[m][n], a[0], b[n].x, b[n].y);
        MultiplyAdd<T>(sums[m][n], a[1], b[n].z, b[n].w);
      }
    }
  }

  WaitForCopies<0>();
  __syncwarp();  // the ring is free
#pragma unroll
  for (int i = 0; i < Tile::kFragments * Tile::kHalves; ++i) {
    const int half = i % Tile::kHalves, m = i / Tile::kHalves / Tile::kTokenTiles;
    const float* sum = sums[m][i / Tile::kHalves % Tile::kTokenTiles] + 2 * half;
    reinterpret_cast<float2*>(shared + warp * Tile::kRingBytes)[i * 32 + lane] = make_float2(sum[0], sum[1]);
  }
  __syncthreads();

  const float2* pairs = reinterpret_cast<const float2*>(shared);
  const std::int64_t first_out = (at.batch * p.tokens + at.first_token) * p.out_features;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kPairs; i += blockDim.x) {
    float2 sum = pairs[i];
#pragma unroll 3
    for (int split = 1; split < splits; ++split) {
      const float2 more = pairs[i + split * (Tile::kRingBytes / int{sizeof(float2)})];
      sum.x += more.x;
      sum.y += more.y;
    }
    const int half = i / 32 % Tile::kHalves, fragment = i / 32 / Tile::kHalves;
    const int feature =
        at.column * Tile::kBlock + at.slice * Tile::kPiece + fragment / Tile::kTokenTiles * 16 + half * 8 + lane / 4;
    const int token = fragment % Tile::kTokenTiles * 8 + lane % 4 * 2;
    if (feature >= p.out_features) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (token + j >= tokens) break;
      const std::int64_t to = first_out + static_cast<std::int64_t>(token + j) * p.out_features + feature;
      if (p.f32_output) {
        static_cast<float*>(p.y)[to] = j ? sum.y : sum.x;
      } else {
        static_cast<T*>(p.y)[to] = static_cast<T>(j ? sum.y : sum.x);
      }
    }
  }
}

// As many warps as run at once on the whole GPU: more would wait for others to end, fewer read less at a time.
template <typename Tile>
int SkinnySplits(std::int64_t ctas, int sm_count) {
  int splits = kMaxSplits;
  while (splits > 4 && ctas * splits > std::int64_t{sm_count} * Tile::kWarpsPerSm) splits -= 4;
  return splits;
}

template <typename T, bool kTranspose, typename Tile>
cudaError_t LaunchSkinnyTile(const MatmulParams& params, int sm_count, cudaStream_t stream) {
  constexpr auto kKernel = MatmulSkinnyKernel<T, kTranspose, Tile>;
  if (const cudaError_t error = AllowSharedMemory<kKernel>(Tile::kMaxSharedBytes); error != cudaSuccess) return error;
  const std::int64_t ctas =
      params.batch * CeilDiv(params.tokens, Tile::kTokens) * CeilDiv(params.out_features, Tile::kBlock) * Tile::kSlices;
  const int splits = SkinnySplits<Tile>(ctas, sm_count);
  return Launch<kKernel>(params, ctas, 32 * splits, splits * Tile::kRingBytes, stream);
}

template <typename T, int kBlock, int kTokens>
cudaError_t LaunchSkinnyTokens(const MatmulParams& params, int sm_count, cudaStream_t stream) {
  using Tile = SkinnyTile<kBlock, kTokens>;
  return params.transpose ? LaunchSkinnyTile<T, true, Tile>(params, sm_count, stream)
                          : LaunchSkinnyTile<T, false, Tile>(params, sm_count, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchSkinnyBlock(const MatmulParams& params, int sm_count, cudaStream_t stream) {
  if (params.tokens <= 16) return LaunchSkinnyTokens<T, kBlock, 16>(params, sm_count, stream);
  if (params.tokens <= 32) return LaunchSkinnyTokens<T, kBlock, 32>(params, sm_count, stream);
  return LaunchSkinnyTokens<T, kBlock, 64>(params, sm_count, stream);
}

// One source file for each element type instantiates this.
template <typename T>
cudaError_t LaunchMatmulSkinnyOf(const MatmulParams& params, int sm_count, cudaStream_t stream) {
  switch (params.block) {
    case 8:
      return LaunchSkinnyBlock<T, 8>(params, sm_count, stream);
    case 16:
      return LaunchSkinnyBlock<T, 16>(params, sm_count, stream);
    case 32:
      return LaunchSkinnyBlock<T, 32>(params, sm_count, stream);
    case 64:
      return LaunchSkinnyBlock<T, 64>(params, sm_count, stream);
    case 128:
      return LaunchSkinnyBlock<T, 128>(params, sm_count, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
