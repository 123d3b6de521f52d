// y = x W and dx = dy W^T for few tokens, on tensor cores by mma.sync, for 16-bit elements and all block sizes.
//
// Here the weights are read once and used for a handful of products, so everything serves to keep many bytes of them
// on their way. Each warp works alone: it owns up to 32 output features (a block column, or a slice of a wide one) for
// up to 64 tokens, takes every n-th unit of the column's list, and copies the units' weights (cp.async) three units
// ahead into a ring of its own; no two warps meet before the end. A unit is 32 deep: a part of a block, one of 32, two
// of 16 or four of 8. x goes from global memory into registers in fragment order: the 32 elements of a token are
// numbered such that a lane's eight are neighbours in memory, and W is laid out to match. The L1 cache shares x
// between the warps of an SM, which walk about the same rows at the same time. Finally the warps that share a column
// add up their sums in a fixed order, through shared memory and, where columns are too few to fill the GPU, between
// the CTAs of a cluster. What bounds it: DRAM bandwidth for large or few blocks; for small blocks x, of which a block
// of b features needs 128 b bytes for its 2 b^2 bytes of weights, from L2 as far as L1 has forgotten it.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"
#include "mma_tile.cuh"

namespace jax_blocksparse {

constexpr int kUnitDepth = 32;
constexpr int kDepthSteps = kUnitDepth / 16;  // mma.sync instructions along the depth

constexpr int kPackThreads = 256;
constexpr int kMaxSplits = 12;  // warps of a CTA

template <int kBlock_, int kTokens_, bool kXAhead_, int kRegisters_>
struct SkinnyTile {
  static constexpr int kRegisters = kRegisters_;
  static constexpr bool kXAhead = kXAhead_;
  static constexpr int kBlock = kBlock_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kPiece = std::min(kBlock, kUnitDepth);  // a unit holds square pieces of this side
  static constexpr int kPieces = kUnitDepth / kPiece;          // of different blocks, side by side in depth
  static constexpr int kParts = kBlock / kPiece;               // units along the depth of a block
  static constexpr int kSlices = kBlock / kPiece;              // CTAs along the features of a block column

  static constexpr bool kPacked = kTokens > 16;  // x
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kFeatureTiles = std::max(1, kPiece / 16);
  static constexpr int kFragments = kTokenTiles * kFeatureTiles;  // of 16 features x 8 tokens
  static constexpr int kHalves = kPiece / kFeatureTiles / 8;      // of a fragment; blocks of 8 use the first alone
  static constexpr int kPairs = kFragments * kHalves * 32;        // of sums of neighbouring tokens

  static constexpr int kUnitBytes = kUnitDepth * kPiece * 2;
  static constexpr int kStages = 4;
  static constexpr int kRingBytes = kStages * kUnitBytes;  // of one warp

  static_assert(kTokens % 8 == 0 && (kStages & (kStages - 1)) == 0);
  static_assert(kPairs * int{sizeof(float2)} <= kRingBytes, "a warp leaves its sums in its ring");
  static_assert(kUnitBytes % (16 * 32) == 0, "all lanes copy equally often");
  static_assert(kMaxSplits * kRingBytes <= 99 * 1024, "the largest that every architecture since sm_80 allows");
};

// How the weights of a unit lie in shared memory, and how they get into fragments.
//
// Depth k of a unit, k = 8 t + 4 j + 2 h + e with t < 4 and j, h, e < 2, is element e of the register h that lane t of
// each group of four holds for product j. So a lane needs eight successive k of x; of W, for dy W^T, as well.
template <int kPiece, bool kTranspose>
struct UnitLayout {
  // All lanes copy kCopies chunks, lane after lane along the rows of a piece, and each time eight rows further down.
  static constexpr int kLanes = 32 * kPiece / kUnitDepth;  // for one piece
  static constexpr int kRowChunks = kPiece / kChunk;
  static constexpr int kCopies = kPiece / 8;
  static_assert(kLanes == 8 * kRowChunks);

  // Where the lane's first chunk goes, and from there the i-th one.
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
      for (int j = 0; j < 2; ++j) {
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
    return entry < static_cast<std::uint32_t>(end_) ? __ldg(params_.order + batch_ * params_.order_batch_stride + entry) : -1;
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

// Which part of y a CTA computes. CTAs that run at the same time share a block column's weights in L2.
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

// Packs x for the kernel below: chunks of eight features, and of each the `padded` tokens, so that whatever the block
// size, lines are read in full. A warp packs 8 tokens x 32 features. What x does not have becomes zeros.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    PackTokensKernel(const __grid_constant__ MatmulParams p, uint4* packed, int padded) {
  LaunchDependents();
  const int chunks = static_cast<int>(CeilDiv(p.in_features, kUnitDepth)) * (kUnitDepth / kChunk);
  const int lane = threadIdx.x % 32;
  const int warps = padded / 8 * (chunks / 4);  // for one x
  int warp = blockIdx.x * (kPackThreads / 32) + threadIdx.x / 32;
  const int batch = warp / warps;
  warp %= warps;
  if (batch > 0 && (p.x_batch_stride == 0 || batch >= p.batch)) return;
  const int token = warp % (padded / 8) * 8 + lane / 4, chunk = warp / (padded / 8) * 4 + lane % 4;
  const T* from = static_cast<const T*>(p.x) + batch * p.x_batch_stride +
                  static_cast<std::int64_t>(token) * p.in_features + chunk * kChunk;
  const int existing = token < p.tokens ? ChunkElements(p.in_features, chunk * kChunk) : 0;
  const bool whole = existing == kChunk && HasAlignedRows(from, p.in_features);
  packed[(static_cast<std::int64_t>(batch) * chunks + chunk) * padded + token] =
      whole ? __ldg(reinterpret_cast<const uint4*>(from)) : ReadUnaligned(from, existing);
}

template <typename T, bool kTranspose, typename Tile>
__global__ void __maxnreg__(Tile::kRegisters)
    MatmulSkinnyKernel(const __grid_constant__ MatmulParams p, const uint4* packed) {
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (line * 32 < p.nnz) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.order + line * 32));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.inner + line * 32));
  }
  if (!Tile::kPacked && line * 64 < p.tokens * p.in_features) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(p.x) + line * 64));
  using Layout = UnitLayout<Tile::kPiece, kTranspose>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int firsts[kMaxSplits][Tile::kStages][4];  // where in x the four chunks of a unit are

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int threads = blockDim.x, splits = threads / 32;
  const SkinnyPosition<Tile> at(p);
  const int tokens = static_cast<int>(min(p.tokens - at.first_token, static_cast<std::int64_t>(Tile::kTokens)));
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
                  kTranspose ? ChunkElements(depth, element) * 2 : row + i * 8 < depth ? 16 : 0);
    }
  };

  // This lane's first token of x, and the distance to the eighth one after it, in chunks.
  const int padded = static_cast<int>(CeilDiv(p.tokens, Tile::kTokens)) * Tile::kTokens;
  const int chunks = static_cast<int>(CeilDiv(p.in_features, kUnitDepth)) * (kUnitDepth / kChunk);
  const uint4* x = Tile::kPacked ? packed + (p.x_batch_stride == 0 ? 0 : static_cast<std::int64_t>(at.batch) * chunks * padded)
                                 : reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + at.batch * p.x_batch_stride);
  x += Tile::kPacked ? at.first_token + lane / 4 : (at.first_token + lane / 4) * (p.in_features / kChunk);
  const auto load_x = [&](uint4(&to)[Tile::kTokenTiles], int stage) {
    const int first = firsts[warp][stage][lane % 4];
    const bool exists = first < p.in_features;
    const uint4* from = x + (Tile::kPacked ? static_cast<std::int64_t>(first / kChunk) * padded : first / kChunk);
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
      to[n] = exists && (Tile::kPacked || lane / 4 + 8 * n < tokens) ? __ldg(from) : make_uint4(0, 0, 0, 0);
      from += Tile::kPacked ? 8 : p.in_features;
    }
  };

  constexpr int kAhead = Tile::kStages - 1;
  float sums[Tile::kFeatureTiles][Tile::kTokenTiles][4] = {};
  const int count = walk.Count();
#pragma unroll 1
  for (int unit = 0; unit < kAhead; ++unit) {
    if (unit < count) copy_unit(unit);
    CommitCopies();
  }
  __syncwarp();
  if (Tile::kPacked) WaitForPrerequisites();
  uint4 next_b[Tile::kTokenTiles];
  if (Tile::kXAhead && count > 0) load_x(next_b, 0);
#pragma unroll 1
  for (int unit = 0; unit < count; ++unit) {
    const int stage = unit & (Tile::kStages - 1);
    __syncwarp();  // no lane reads the unit before any more
    if (unit + kAhead < count) copy_unit((unit + kAhead) & (Tile::kStages - 1));
    CommitCopies();
    uint4 b[Tile::kTokenTiles];
    if constexpr (Tile::kXAhead) {
#pragma unroll
      for (int n = 0; n < Tile::kTokenTiles; ++n) b[n] = next_b[n];
      if (unit + 1 < count) load_x(next_b, (unit + 1) & (Tile::kStages - 1));
    } else {
      load_x(b, stage);
    }
    WaitForCopies<kAhead>();
    __syncwarp();  // the unit has landed
#pragma unroll
    for (int m = 0; m < Tile::kFeatureTiles; ++m) {
      std::uint32_t a[kDepthSteps][4];
      Layout::Load(a, ring + stage * Tile::kUnitBytes, m, lane);
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
  for (int i = thread; i < Tile::kPairs; i += threads) {
    float2 sum = pairs[i];
#pragma unroll 3
    for (int split = 1; split < splits; ++split) {
      const float2 more = pairs[i + split * (Tile::kRingBytes / int{sizeof(float2)})];
      sum.x += more.x;
      sum.y += more.y;
    }
    const int half = i / 32 % Tile::kHalves, fragment = i / 32 / Tile::kHalves;
    const int feature = at.column * Tile::kBlock + at.slice * Tile::kPiece + fragment / Tile::kTokenTiles * 16 +
                        half * 8 + lane / 4;
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

}  // namespace jax_blocksparse
