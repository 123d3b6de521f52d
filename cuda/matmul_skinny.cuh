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

template <int kBlock_, int kTokenTiles, int kSplits_>
struct SkinnyTile {
  static constexpr int kBlock = kBlock_;
  static constexpr int kTokens = 16 * kTokenTiles;
  static constexpr int kPiece = std::min(kBlock, kUnitDepth);  // a unit holds square pieces of this side
  static constexpr int kPieces = kUnitDepth / kPiece;          // of different blocks, side by side in depth
  static constexpr int kParts = kBlock / kPiece;               // units along the depth of a block
  static constexpr int kSlices = kBlock / kPiece;              // warps along the features of a block column
  static constexpr int kSplits = kSplits_;                     // warps that share the units of a slice
  static constexpr int kWarps = kSlices * kSplits;
  static constexpr int kThreads = 32 * kWarps;

  static constexpr int kFeatureTiles = kPiece / 8;
  static constexpr int kFragments = kTokenTiles * kFeatureTiles;  // of 16 tokens x 8 features, a float4 a lane
  static constexpr int kSumBytes = kFragments * 32 * int{sizeof(float4)};

  static constexpr int kUnitBytes = kUnitDepth * kPiece * 2;
  static constexpr int kStages = 4;
  static constexpr int kRingBytes = kStages * kUnitBytes;  // of one warp
  static constexpr int kSharedBytes = kWarps * kRingBytes;
  static constexpr int kWarpsPerSm = kFragments == 16 ? 16 : kFragments == 8 ? 20 : 24;
  static constexpr int kCtasPerSm = std::max(1, kWarpsPerSm / kWarps);

  static_assert(kWarps <= 32 && (kStages & (kStages - 1)) == 0);
  static_assert(kSumBytes <= kRingBytes, "a warp leaves its sums in its ring");
  static_assert(kUnitBytes % (16 * 32) == 0, "all lanes copy equally often");
  static_assert(kSharedBytes <= 99 * 1024, "the largest that every architecture since sm_80 allows");
};

// How the weights of a unit lie in shared memory, and how they get into fragments.
//
// Depth k of a unit, k = 8 t + 4 j + 2 h + e with t < 4 and j, h, e < 2, is element e of the register h that lane t of
// each group of four holds for product j. So a lane needs eight successive k of x; of W, for dy W^T, as well.
template <int kPiece, bool kTranspose>
struct UnitLayout {
  // Where chunk `chunk` of row `row` of piece `piece` goes.
  static __device__ __forceinline__ std::uint32_t Offset(int piece, int row, int chunk) {
    if constexpr (kTranspose) {
      return row * (kUnitDepth * 2) + (piece * (kPiece / kChunk) + chunk) * 16;
    } else {
      const int k = piece * kPiece + row, t = k / 8, j = k / 4 % 2, h = k / 2 % 2, e = k % 2;
      return TileOffset<kPiece>(16 * j + 8 * h + 2 * t + e, chunk);
    }
  }

  // The fragments of all products for the eight features from 8 * n8 on, in b[j][0 and 1]; with pieces of 16 features
  // and more also those for the next eight, in b[j][2 and 3].
  static constexpr int kGroup = std::min(2, kPiece / 8);
  static __device__ __forceinline__ void Load(std::uint32_t (&b)[kDepthSteps][2 * kGroup], std::uint32_t unit, int n8,
                                              int lane) {
    static_assert(kDepthSteps == 2);
    if constexpr (kTranspose) {
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        const uint4 words = LoadShared16(unit + (8 * (n8 + n) + lane / 4) * (kUnitDepth * 2) + lane % 4 * 16);
        b[0][2 * n] = words.x;
        b[0][2 * n + 1] = words.y;
        b[1][2 * n] = words.z;
        b[1][2 * n + 1] = words.w;
      }
    } else if constexpr (kGroup == 1) {
      std::uint32_t words[4];
      LoadMatrices<true>(words, unit + TileOffset<kPiece>(lane, 0));
      b[0][0] = words[0];
      b[0][1] = words[1];
      b[1][0] = words[2];
      b[1][1] = words[3];
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        LoadMatrices<true>(b[j], unit + TileStep<kPiece>(RowsFirstOffset<kPiece>(lane), j, n8 / 2));
      }
    }
  }
};

// The units of a column's list that one warp works on: unit `share` and every `shares`-th after it.
//
// The 32 lanes hold a window of units, the following window, and the ids of the one after that: order[i] and
// inner[order[i]] are two dependent loads, and each is issued a window before it is needed. Entries with an id or a row
// out of range, and those that fill the last unit up, are of depth 0.
template <typename Tile>
class UnitWalk {
  static constexpr unsigned kAllLanes = 0xffffffffu;
  static constexpr int kWindow = 32 / Tile::kPieces;

 public:
  struct Unit {
    int id;     // of the block from which this lane copies
    int first;  // where in x its piece starts; at or behind the end if there is none
  };

  __device__ UnitWalk(const MatmulParams& params, int batch, int column, int share, int shares)
      : params_(params), batch_(batch), lane_(threadIdx.x % 32), shares_(shares) {
    const std::int32_t* ptr = params.ptr + batch * params.ptr_batch_stride + column;
    begin_ = max(0, min(__ldg(ptr), params.nnz));
    end_ = max(static_cast<int>(begin_), min(__ldg(ptr + 1), params.nnz));
    const int units = (end_ - begin_ + Tile::kPieces - 1) / Tile::kPieces * Tile::kParts;
    count_ = units > share ? (units - share - 1) / shares + 1 : 0;
    far_unit_ = share + lane_ / Tile::kPieces * shares;
    far_id_ = IdAt(far_unit_);
    for (int i = 0; i < 2; ++i) Refill();
  }

  __device__ int count() const { return count_; }

  __device__ Unit Next() {
    if (head_ == kWindow) Refill();
    const int source = head_++ * Tile::kPieces + lane_ / (32 / Tile::kPieces);
    return {__shfl_sync(kAllLanes, id_, source), __shfl_sync(kAllLanes, first_, source)};
  }

 private:
  // Behind every x, and still so when the 31 depths of a unit are added.
  static constexpr int kNowhere = INT_MAX - kUnitDepth;

  __device__ int IdAt(std::uint32_t unit) const {
    const std::uint32_t entry = begin_ + unit / Tile::kParts * Tile::kPieces + lane_ % Tile::kPieces;
    return entry < end_ ? __ldg(params_.order + batch_ * params_.order_batch_stride + entry) : -1;
  }

  __device__ int FirstOf(int id, std::uint32_t unit) const {
    if (id < 0 || id >= params_.nnz) return kNowhere;
    const int row = __ldg(params_.inner + batch_ * params_.order_batch_stride + id);
    if (row < 0 || row >= CeilDiv(params_.in_features, Tile::kBlock)) return kNowhere;
    return row * Tile::kBlock + static_cast<int>(unit % Tile::kParts) * kUnitDepth;
  }

  __device__ void Refill() {
    id_ = next_id_;
    first_ = next_first_;
    next_id_ = far_id_;
    next_first_ = FirstOf(far_id_, far_unit_);
    far_unit_ += kWindow * shares_;
    far_id_ = IdAt(far_unit_);
    head_ = 0;
  }

  const MatmulParams& params_;
  int batch_, lane_, shares_, count_;
  std::uint32_t begin_, end_;
  std::uint32_t far_unit_;  // unsigned: may pass the end, and so 2^31, by three windows
  int head_ = 0;            // first unit of the window that is not used up
  int id_ = -1, first_ = kNowhere;
  int next_id_ = -1, next_first_ = kNowhere;
  int far_id_;
};

template <typename T, int kBlock, bool kTranspose, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    MatmulSkinnyKernel(const __grid_constant__ MatmulParams p, int cluster) {
  using Layout = UnitLayout<Tile::kPiece, kTranspose>;
  constexpr int kTokenTiles = Tile::kTokens / 16;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int firsts[Tile::kWarps][Tile::kStages][4];  // where in x the four chunks of a unit are

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rank = blockIdx.x % cluster;
  const int token_tiles = static_cast<int>(CeilDiv(p.tokens, Tile::kTokens));
  const int columns = static_cast<int>(CeilDiv(p.out_features, kBlock));
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.x / cluster % token_tiles) * Tile::kTokens;
  const int column = blockIdx.x / cluster / token_tiles % columns;
  const int batch = blockIdx.x / cluster / token_tiles / columns;
  const int tokens = static_cast<int>(min(p.tokens - first_token, static_cast<std::int64_t>(Tile::kTokens)));
  const int slice = warp / Tile::kSplits, split = warp % Tile::kSplits;

  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride + (first_token + lane / 4) * p.in_features;
  const T* data = static_cast<const T*>(p.data) + batch * p.data_batch_stride;
  const std::uint32_t ring = SharedAddress(shared) + warp * Tile::kRingBytes;

  UnitWalk<Tile> walk(p, batch, column, rank * Tile::kSplits + split, cluster * Tile::kSplits);

  const auto copy_unit = [&](int stage) {
    constexpr int kLanes = 32 / Tile::kPieces;  // that copy the same piece
    constexpr int kRowChunks = Tile::kPiece / kChunk;
    const auto unit = walk.Next();
    const int piece = lane / kLanes;
    const int depth = p.in_features - unit.first;  // of the piece, as far as it exists
    if (lane % 8 == 0) firsts[warp][stage][lane / 8] = unit.first + lane % kLanes / 8 * kChunk;
    const int part = unit.first % kBlock / Tile::kPiece;
    const T* from = data + static_cast<std::int64_t>(depth > 0 ? unit.id : 0) * (kBlock * kBlock) +
                    (kTranspose ? slice * kBlock + part : part * kBlock + slice) * Tile::kPiece;
#pragma unroll
    for (int i = 0; i < Tile::kPiece * kRowChunks / kLanes; ++i) {
      const int chunk = lane % kLanes + i * kLanes;
      const int row = chunk / kRowChunks, c = chunk % kRowChunks;
      CopyAsync16(ring + stage * Tile::kUnitBytes + Layout::Offset(piece, row, c), from + row * kBlock + c * kChunk,
                  kTranspose    ? ChunkElements(depth, c * kChunk) * 2
                  : row < depth ? 16
                                : 0);
    }
  };

  float sums[kTokenTiles][Tile::kFeatureTiles][4] = {};

  // The first rounds only load; in each later one, a unit is loaded while the oldest one is multiplied.
  constexpr int kAhead = Tile::kStages - 1;
  const int count = walk.count();
#pragma unroll 1
  for (int unit = -kAhead; unit < count; ++unit) {
    const int stage = unit & (Tile::kStages - 1);
    uint4 a[kTokenTiles][2];
    if (unit >= 0) {
      const int first = firsts[warp][stage][lane % 4];
      const T* from = x + first;
#pragma unroll
      for (int i = 0; i < 2 * kTokenTiles; ++i) {
        const bool exists = lane / 4 + i * 8 < tokens && first < p.in_features;
        a[i / 2][i % 2] = exists ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
        from += static_cast<std::int64_t>(8) * p.in_features;
      }
    }
    WaitForCopies<kAhead - 1>();
    __syncwarp();  // the unit has landed, and no lane reads the one before any more
    if (unit + kAhead < count) copy_unit((unit + kAhead) & (Tile::kStages - 1));
    CommitCopies();
    if (unit < 0) continue;
#pragma unroll
    for (int n8 = 0; n8 < Tile::kFeatureTiles; n8 += Layout::kGroup) {
      std::uint32_t b[kDepthSteps][2 * Layout::kGroup];
      Layout::Load(b, ring + stage * Tile::kUnitBytes, n8, lane);
#pragma unroll
      for (int n = 0; n < Layout::kGroup; ++n) {
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
          MultiplyAdd<T>(sums[m][n8 + n], {a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y}, b[0][2 * n], b[0][2 * n + 1]);
          MultiplyAdd<T>(sums[m][n8 + n], {a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w}, b[1][2 * n], b[1][2 * n + 1]);
        }
      }
    }
  }

  WaitForCopies<0>();
  __syncwarp();  // the ring is free
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kFeatureTiles; ++n) {
      const float* s = sums[m][n];
      reinterpret_cast<float4*>(shared + warp * Tile::kRingBytes)[(m * Tile::kFeatureTiles + n) * 32 + lane] =
          make_float4(s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();

  constexpr int kVectors = Tile::kFragments * 32;
  constexpr int kRingVectors = Tile::kRingBytes / int{sizeof(float4)};
  float4* const all_sums = reinterpret_cast<float4*>(shared);
  const auto add = [](float4& sum, const float4& more) {
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
  };
  const auto sum_of_splits = [&](int place) {
    float4 sum = all_sums[place];
#pragma unroll
    for (int i = 1; i < Tile::kSplits; ++i) add(sum, all_sums[place + i * kRingVectors]);
    return sum;
  };
  if (cluster > 1) {
    for (int i = thread; i < Tile::kSlices * kVectors; i += Tile::kThreads) {
      const int place = i / kVectors * Tile::kSplits * kRingVectors + i % kVectors;
      if (Tile::kSplits > 1) all_sums[place] = sum_of_splits(place);
    }
    ClusterSync();
  }

  const std::int64_t first_out = (batch * p.tokens + first_token) * p.out_features;
  const bool in_pairs = p.out_features % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.y) % (2 * sizeof(float)) == 0;
  const auto write = [&](auto* y, int features, float first, float second) {
    if (in_pairs && features >= 2) {
      StorePair(y, first, second);
    } else {
      if (features > 0) y[0] = static_cast<std::remove_pointer_t<decltype(y)>>(first);
      if (features > 1) y[1] = static_cast<std::remove_pointer_t<decltype(y)>>(second);
    }
  };
#pragma unroll 1
  for (int i = rank * Tile::kThreads + thread; i < Tile::kSlices * kVectors; i += cluster * Tile::kThreads) {
    const int place = i / kVectors * Tile::kSplits * kRingVectors + i % kVectors;
    float4 sum;
    if (cluster == 1) {
      sum = sum_of_splits(place);
    } else {
      const std::uint32_t address = SharedAddress(all_sums + place);
      sum = LoadClusterShared16(address, 0);
#pragma unroll 1
      for (int r = 1; r < cluster; ++r) add(sum, LoadClusterShared16(address, r));
    }
    const int fragment = i % kVectors / 32;
    const int feature =
        column * kBlock + i / kVectors * Tile::kPiece + fragment % Tile::kFeatureTiles * 8 + lane % 4 * 2;
    const int token = fragment / Tile::kFeatureTiles * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (token + 8 * half >= tokens) continue;
      const std::int64_t to = first_out + static_cast<std::int64_t>(token + 8 * half) * p.out_features + feature;
      const float first = half ? sum.z : sum.x, second = half ? sum.w : sum.y;
      if (p.f32_output) {
        write(static_cast<float*>(p.y) + to, p.out_features - feature, first, second);
      } else {
        write(static_cast<T*>(p.y) + to, p.out_features - feature, first, second);
      }
    }
  }
  if (cluster > 1) ClusterSync();  // the others may still be reading from here
}

}  // namespace jax_blocksparse
