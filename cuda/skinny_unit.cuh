// What a warp of the few-token kernel works on: units of a column's list, their way into shared memory and from there
// into fragments.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels.h"
#include "mma_tile.cuh"
#include "skinny_pack.cuh"

namespace jax_blocksparse {

constexpr int kClusterCtas = 8;  // that share the rest of long lists, where clusters exist
constexpr int kUnitDepth = 32;
constexpr int kDepthSteps = kUnitDepth / 16;  // mma.sync instructions along the depth
constexpr int kUnitChunks = kUnitDepth / kChunk;

template <int kBlock_, int kTokens_, bool kIsPacked_>
struct SkinnyTile {
  static constexpr int kBlock = kBlock_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kIsPacked = kIsPacked_;  // x, see skinny_pack.cuh; else warps copy it as they copy weights
  static constexpr int kPiece = std::min(kBlock, kUnitDepth);  // as deep are the pieces of different blocks
  static constexpr int kPieces = kUnitDepth / kPiece;          // that lie side by side in a unit
  static constexpr int kParts = kBlock / kPiece;               // units along the depth of a block
  // Wide slices read x less often; narrow ones make more CTAs.
  static constexpr int kFeatures = std::min(kBlock, kTokens < 32 ? 32 : 64);
  static constexpr int kSlices = kBlock / kFeatures;  // CTAs along the features of a block column

  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kFeatureTiles = std::max(1, kFeatures / 16);
  static constexpr int kHalves = std::min(2, kFeatures / 8);  // of 16 features; blocks of 8 use the first alone
  static constexpr int kSumsPitch = kFeatures + 4;  // of a token, where warps exchange them; no bank conflicts
  static constexpr int kSumsBytes = kTokens * kSumsPitch * 4;

  static constexpr int kWeightBytes = kUnitDepth * kFeatures * 2;
  static constexpr int kUnitBytes = kWeightBytes + kUnitDepth * kTokens * 2;
  static constexpr int kStages = 3;
  static constexpr int kAhead = kStages - 1;
  static constexpr int kBarriers = kStages * kUnitBytes;  // where those begin that packed x needs, one for each stage
  // Of one warp. Whole lines: bulk copies to other places took 1.5 times as long.
  static constexpr int kRingBytes = kBarriers + (kIsPacked ? 128 : 0);
  // 98 KB: what every architecture since sm_80 allows, and some left.
  static constexpr int kMaxSplits = std::min(12, 98 * 1024 / kRingBytes);  // warps of a CTA
  static constexpr int kMaxSharedBytes = kMaxSplits * kRingBytes;

  // The sums and a unit's x take most of them.
  static constexpr int kRegisters = kIsPacked ? kFeatureTiles * kTokenTiles * 4 + kTokens / 2 + 48
                                              : std::max(8, kTokens* kFeatures / 32) + (kTokens < 32   ? 64
                                                                                        : kTokens < 64 ? 80
                                                                                                       : 104);

  static_assert(kTokens % 8 == 0 && kTokenTiles <= 32 && kFeatures % kChunk == 0 && kSlices * kFeatures == kBlock);
  static_assert(kAhead <= 32 / kPieces, "the first copies are of the first window of units");
  static_assert(kSumsBytes <= kBarriers && kRingBytes % 128 == 0, "a warp leaves its sums in its ring");
  static_assert(kRegisters % 8 == 0 && kRegisters <= 255 && kRegisters * 32 * kMaxSplits <= 65536);
};

// How the weights of a unit lie in shared memory, how they get there, and from there into fragments: for x W with a row
// for each of the 32 depths, for dy W^T with a row for each feature.
template <typename Tile, bool kTranspose>
struct UnitLayout {
  static constexpr int kLanes = 32 / Tile::kPieces;  // that copy the same piece
  static constexpr int kRow = kTranspose ? kUnitDepth : Tile::kFeatures;
  static constexpr int kPieceChunks = (kTranspose ? Tile::kPiece : Tile::kFeatures) / kChunk;  // in a row of a piece
  static constexpr int kPieceRows = kTranspose ? Tile::kFeatures : Tile::kPiece;
  static constexpr int kStepRows = kLanes / kPieceChunks;  // that a piece's lanes copy at a time
  static constexpr int kSteps = kPieceRows / kStepRows;
  static_assert(kStepRows * kPieceChunks == kLanes && kSteps * kStepRows == kPieceRows);
  static_assert(kRow == 64 ? kStepRows == 4 : kStepRows == 8, "see Place");

  int piece, row, chunk;  // what a lane copies first

  __device__ explicit UnitLayout(int lane)
      : piece(lane / kLanes), row(lane % kLanes / kPieceChunks), chunk(lane % kPieceChunks) {}

  // Where it goes, and from there what is `step` steps further down.
  __device__ __forceinline__ std::uint32_t Place() const {
    return kTranspose ? TileOffset<kRow>(row, piece * kPieceChunks + chunk)
                      : TileOffset<kRow>(piece * Tile::kPiece + row, chunk);
  }
  static __device__ __forceinline__ std::uint32_t Place(std::uint32_t place, int step) {
    return (kRow == 64 ? place ^ (step % 2 * 64) : place) + step * (kStepRows * kRow * 2);
  }

  // Whether that, in a piece of which `depth` exists, does not exist.
  __device__ __forceinline__ bool IsBeyond(int step, int depth) const {
    return (kTranspose ? chunk * kChunk : row + step * kStepRows) >= depth;
  }

  // The left operands of the products for 16 features, or for the 8 of a small block.
  static __device__ __forceinline__ void Load(std::uint32_t (&a)[kDepthSteps][4], std::uint32_t weights, int feature16,
                                              int lane) {
    static_assert(kDepthSteps == 2);
    if constexpr (Tile::kFeatures == 8) {
      std::uint32_t words[4];
      LoadMatrices<!kTranspose>(
          words, weights + (kTranspose ? TileOffset<kRow>(lane % 8, lane / 8) : TileOffset<kRow>(lane, 0)));
#pragma unroll
      for (int j = 0; j < kDepthSteps; ++j) {
        a[j][0] = words[2 * j];
        a[j][2] = words[2 * j + 1];
        a[j][1] = a[j][3] = 0;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kDepthSteps; ++j) {
        if constexpr (kTranspose) {
          LoadMatrices<false>(a[j], weights + TileStep<kRow>(RowsFirstOffset<kRow>(lane), feature16, j));
        } else {
          LoadMatrices<true>(a[j], weights + TileStep<kRow>(ChunksFirstOffset<kRow>(lane), j, feature16));
        }
      }
    }
  }
};

// The units of a part of a column's list that one warp works on: unit `share` and every `shares`-th after it.
//
// The 32 lanes hold a window of units and, soon after its beginning, the following one: order[i] and inner[order[i]]
// are two dependent loads, which nothing waits for.
template <typename Tile>
class UnitWalk {
  static constexpr unsigned kAllLanes = 0xffffffffu;
  static constexpr int kWindow = 32 / Tile::kPieces;
  static constexpr int kNowhere = INT_MAX - kUnitDepth;  // still behind every x when depths of a unit are added

 public:
  __device__ UnitWalk(const MatmulParams& params, int batch)
      : order_(params.order + batch * params.order_batch_stride),
        inner_(params.inner + batch * params.order_batch_stride),
        nnz_(params.nnz),
        rows_((params.in_features + Tile::kBlock - 1) / Tile::kBlock),
        lane_(threadIdx.x % 32) {}

  // Of the entries from `begin` up to `end`.
  __device__ void Start(int begin, int end, int share, int shares) {
    begin_ = begin;
    end_ = end;
    share_ = share;
    shares_ = shares;
    // No memory holds so many blocks that 32 bits would not do for their units.
    units_ = static_cast<std::uint32_t>(end_ - begin_ + Tile::kPieces - 1) / Tile::kPieces * Tile::kParts;
    id_ = IdAt(IndexOf(lane_ / Tile::kPieces), lane_ % Tile::kPieces);
    row_ = RowOf(id_);
  }

  __device__ bool Exists(int unit) const { return IndexOf(unit) < units_; }

  // To be called for one unit after the other, from the kAhead-th on, before that unit is asked for.
  __device__ void MoveTo(int unit) {
    static_assert(Tile::kAhead + 2 < kWindow);
    const int in_window = unit % kWindow;
    if (in_window == Tile::kAhead) {
      next_id_ = IdAt(IndexOf(unit - in_window + kWindow + lane_ / Tile::kPieces), lane_ % Tile::kPieces);
    } else if (in_window == Tile::kAhead + 2) {
      next_row_ = RowOf(next_id_);
    } else if (in_window == 0) {
      id_ = next_id_;
      row_ = next_row_;
    }
  }

  // The id of the block of a piece, or that of another where there is none.
  __device__ int Id(int unit, int piece) const {
    const int id = __shfl_sync(kAllLanes, id_, unit % kWindow * Tile::kPieces + piece);
    return IsId(id) ? id : 0;
  }

  // Where in the block, in units, the unit begins.
  __device__ int Part(int unit) const { return IndexOf(unit) % Tile::kParts; }

  // Where in x a piece begins: behind its end if the block's id or row is out of range, or if there is no block.
  __device__ int First(int unit, int piece) const {
    return FirstOf(__shfl_sync(kAllLanes, row_, unit % kWindow * Tile::kPieces + piece), unit);
  }

  // The same for any unit, from memory.
  __device__ int ReadFirst(int unit, int piece) const { return FirstOf(RowOf(IdAt(IndexOf(unit), piece)), unit); }

 private:
  // The place of a unit in the column. Unsigned: may pass the end, and so 2^31, by two windows.
  __device__ std::uint32_t IndexOf(int unit) const { return share_ + static_cast<std::uint32_t>(unit) * shares_; }

  __device__ int IdAt(std::uint32_t index, int piece) const {
    const std::uint32_t entry = begin_ + index / Tile::kParts * Tile::kPieces + piece;
    return LoadIf(entry < static_cast<std::uint32_t>(end_), order_ + entry, -1);
  }

  __device__ bool IsId(int id) const { return id >= 0 && id < nnz_; }
  __device__ int RowOf(int id) const { return LoadIf(IsId(id), inner_ + id, -1); }

  __device__ int FirstOf(int row, int unit) const {
    return row >= 0 && row < rows_ ? row * Tile::kBlock + Part(unit) * kUnitDepth : kNowhere;
  }

  const std::int32_t* order_;
  const std::int32_t* inner_;
  int nnz_, rows_, lane_, share_, shares_;
  int begin_, end_;
  std::uint32_t units_;
  int id_, row_, next_id_, next_row_;
};

// Which part of y a CTA computes. What runs at the same time shares a block column's weights in L2.
template <typename Tile>
struct SkinnyPosition {
  int batch, column, slice;
  std::int64_t first_token;

  // A grid of three dimensions, because divisions would delay the first loads. It may have more columns than W.
  __device__ SkinnyPosition()
      : batch(blockIdx.z),
        column(blockIdx.y / Tile::kSlices),
        slice(blockIdx.y % Tile::kSlices),
        first_token(static_cast<std::int64_t>(blockIdx.x) * Tile::kTokens) {}
};

// The lists of the columns that the CTAs of a cluster have, CTA l's in lane l. What a long one has beyond `kept`
// entries is shared by all CTAs of the cluster.
template <typename Tile>
class ClusterLists {
 public:
  __device__ ClusterLists(const MatmulParams& p, const SkinnyPosition<Tile>& at, int kept) : nnz_(p.nnz), kept_(kept) {
    const int lane = threadIdx.x % 32, column = (blockIdx.y / kClusterCtas * kClusterCtas + lane) / Tile::kSlices;
    const bool exists = lane < kClusterCtas && column * std::int64_t{Tile::kBlock} < p.out_features;
    const std::int32_t* ptr = p.ptr + at.batch * p.ptr_batch_stride + column;
    begin_ = LoadIf(exists, ptr, 0);
    end_ = LoadIf(exists, ptr + 1, 0);
  }

  // Waits for them. Says which CTAs' lists are long.
  __device__ std::uint32_t Start() {
    begin_ = max(0, min(begin_, nnz_));
    end_ = max(begin_, min(end_, nnz_));
    return __ballot_sync(0xffffffffu, end_ - begin_ > 2 * std::int64_t{kept_});
  }
  __device__ int Begin(int cta) const { return __shfl_sync(0xffffffffu, begin_, cta); }
  __device__ int End(int cta) const { return __shfl_sync(0xffffffffu, end_, cta); }

 private:
  int nnz_, kept_, begin_, end_;
};

// The copies of one warp. `x` is packed or as it is.
template <typename T, bool kTranspose, typename Tile>
class UnitCopier {
  using Layout = UnitLayout<Tile, kTranspose>;
  static constexpr int kBlock = Tile::kBlock;
  static constexpr int kPieceBytes = Tile::kTokens * Tile::kPiece * 2;

 public:
  __device__ UnitCopier(const MatmulParams& p, const void* x, std::int64_t x_batch_stride,
                        const SkinnyPosition<Tile>& at, int slice)
      : in_features_(p.in_features), layout_(threadIdx.x % 32) {
    const int lane = threadIdx.x % 32;
    data_ = static_cast<const T*>(p.data) + at.batch * p.data_batch_stride + layout_.row * kBlock +
            layout_.chunk * kChunk + slice * Tile::kFeatures * (kTranspose ? kBlock : 1);
    x_ = static_cast<const T*>(x) + at.batch * x_batch_stride;
    if constexpr (!Tile::kIsPacked) {
      const int tokens = static_cast<int>(min(p.tokens - at.first_token, std::int64_t{8} * 32));
      // Tokens that do not exist are copied from others, by 0 bytes.
      x_depth_ = lane % kUnitChunks * kChunk;
      x_ += (at.first_token + min(lane / kUnitChunks, tokens - 1)) * p.in_features + x_depth_ % Tile::kPiece;
      x_place_ = Tile::kWeightBytes + TileOffset<kUnitDepth>(lane / kUnitChunks, lane % kUnitChunks);
      for (int n = 0; n < Tile::kTokenTiles; ++n) token_mask_ |= (lane / kUnitChunks + 8 * n < tokens ? 1u : 0u) << n;
    }
  }

  __device__ void CopyWeights(std::uint32_t stage, const UnitWalk<Tile>& walk, int unit) const {
    const T* from = data_ + static_cast<std::int64_t>(walk.Id(unit, layout_.piece)) * (kBlock * kBlock) +
                    walk.Part(unit) * (kTranspose ? kUnitDepth : kUnitDepth * kBlock);
    const std::uint32_t to = stage + layout_.Place();
#pragma unroll
    for (int i = 0; i < Layout::kSteps; ++i) {
      CopyAsync16(Layout::Place(to, i), from + i * (Layout::kStepRows * kBlock), 16);
    }
  }

  // Says whether a piece of the unit does not exist or reaches beyond x, and so into parts of the weights that may hold
  // anything: see Cut.
  __device__ bool CopyX(std::uint32_t stage, const UnitWalk<Tile>& walk, int unit) const {
    const int first = walk.First(unit, x_depth_ / Tile::kPiece);
    const bool exists = first + x_depth_ % Tile::kPiece < in_features_;
    const T* from = x_ + (exists ? first : 0);
#pragma unroll
    for (int n = 0; n < Tile::kTokenTiles; ++n) {
      const bool copies = exists && (token_mask_ >> n & 1) != 0;
      CopyAsync16(stage + x_place_ + n * (8 * kUnitDepth * 2), copies ? from : x_, copies ? 16 : 0);
      from += std::int64_t{8} * in_features_;
    }
    return __any_sync(0xffffffffu, !exists);
  }

  // The same for packed x, a piece a lane.
  __device__ bool CopyPackedX(std::uint32_t stage, std::uint32_t barrier, const UnitWalk<Tile>& walk, int unit) const {
    const int lane = threadIdx.x % 32, first = walk.First(unit, lane % Tile::kPieces);
    const bool copies = first < in_features_ && lane < Tile::kPieces;
    const int pieces = __popc(__ballot_sync(0xffffffffu, copies));
    if (lane == 0) ArriveExpecting(barrier, pieces * kPieceBytes);
    if (copies) {
      const T* const from = x_ + std::uint64_t{static_cast<std::uint32_t>(first)} * Tile::kTokens;
      LoadBytes(stage + Tile::kWeightBytes + lane * kPieceBytes, from, kPieceBytes, barrier);
    }
    return __any_sync(0xffffffffu, first + Tile::kPiece > in_features_);
  }

  // The right operands of all token tiles, by chunks of the depth.
  __device__ void ReadX(std::uint32_t (&b)[Tile::kTokenTiles][kUnitChunks], std::uint32_t stage) const {
    if constexpr (Tile::kIsPacked) {
      using Packed = PackedPiece<Tile>;
      const std::uint32_t from = stage + Tile::kWeightBytes + threadIdx.x % 32 * (Packed::kWords * 4);
#pragma unroll
      for (int i = 0; i < Tile::kPieces * Packed::kLoads; ++i) {
        std::uint32_t words[Packed::kWords];
        LoadSharedWords(words, from + i * (32 * 4 * Packed::kWords));
#pragma unroll
        for (int j = 0; j < Packed::kWords; ++j) {
          const int piece = i / Packed::kLoads, word = i % Packed::kLoads * Packed::kWords + j;
          b[word / Packed::kChunks][piece * Packed::kChunks + word % Packed::kChunks] = words[j];
        }
      }
    } else {
      const int lane = threadIdx.x % 32;
      const std::uint32_t from = stage + Tile::kWeightBytes + TileOffset<kUnitDepth>(lane % 8, lane / 8);
#pragma unroll
      for (int n = 0; n < Tile::kTokenTiles; ++n) LoadMatrices<false>(b[n], from + n * (8 * kUnitDepth * 2));
    }
  }

  // Makes zeros of what does not exist: of weights, and of packed x, which is copied where it exists.
  __device__ void Cut(std::uint32_t stage, const UnitWalk<Tile>& walk, int unit) const {
    const int depth = in_features_ - walk.ReadFirst(unit, layout_.piece);
    const std::uint32_t to = stage + layout_.Place();
    for (int i = 0; i < Layout::kSteps; ++i) {
      if (layout_.IsBeyond(i, depth)) StoreShared16(Layout::Place(to, i), make_uint4(0, 0, 0, 0));
    }
    if constexpr (Tile::kIsPacked) {
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        if (walk.ReadFirst(unit, piece) < in_features_) continue;
        const std::uint32_t x = stage + Tile::kWeightBytes + piece * kPieceBytes;
        for (int i = threadIdx.x % 32 * 16; i < kPieceBytes; i += 32 * 16) {
          StoreShared16(x + i, make_uint4(0, 0, 0, 0));
        }
      }
      FenceBeforeCopies();
    }
    __syncwarp();
  }

 private:
  int in_features_;
  Layout layout_;
  const T* data_;  // the lane's chunk in block 0
  const T* x_;     // the lane's chunk of the first piece of its first token; or packed x
  int x_depth_;    // of the lane's chunk in the unit
  std::uint32_t x_place_;
  std::uint32_t token_mask_ = 0;  // bit n: the token 8 n after the first exists
};

}  // namespace jax_blocksparse
