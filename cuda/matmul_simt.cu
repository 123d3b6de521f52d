// y = x W and dx = dy W^T by plain FMA, for float32 in any block size and for 16-bit elements in blocks of 8.
//
// A CTA computes some tokens x one block column, or a part of one, and walks the column's list, in slices of the block
// up to 32 deep. Slices of x and of the block travel to shared memory by asynchronous copies, one slice or more ahead.
// Each thread keeps a tile of sums, 8 x 8 where the block allows, in registers. Rows of x stay as they are, depth
// innermost, and so do those of a block that is transposed: a thread reads four depths of a token at once. Values
// become float on their way into registers, so the element type does not matter to the products. What bounds it: for
// blocks of 16 and more issuing instructions, seven in eight of which are FMAs; for blocks of 8 reads of x from L2 in
// pieces of 32 bytes.
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "simt_tile.cuh"

namespace jax_blocksparse {
namespace {

// What a CTA computes: kTokenWarps x kFeatureWarps warps, each kWarpFeatures wide, with kThreadTokens x kThreadFeatures
// sums a lane.
template <int kTokenWarpCount, int kFeatureWarpCount, int kTokensOfThread, int kFeaturesOfThread, int kFeaturesOfWarp,
          int kDepthOfSlice, int kStageCount, int kCtaCount>
struct SimtMatmulTile {
  static constexpr int kTokenWarps = kTokenWarpCount, kFeatureWarps = kFeatureWarpCount;
  static constexpr int kThreads = kTokenWarps * kFeatureWarps * 32;
  static constexpr int kThreadTokens = kTokensOfThread, kThreadFeatures = kFeaturesOfThread;
  static constexpr int kWarpFeatures = kFeaturesOfWarp;
  static constexpr int kFeatureLanes = kWarpFeatures / kThreadFeatures, kTokenLanes = 32 / kFeatureLanes;
  static constexpr int kWarpTokens = kTokenLanes * kThreadTokens;
  static constexpr int kTokens = kTokenWarps * kWarpTokens, kFeatures = kFeatureWarps * kWarpFeatures;
  static constexpr int kDepth = kDepthOfSlice;
  static constexpr int kStages = kStageCount;
  static constexpr int kCtas = kCtaCount;  // that an SM has registers for
  static constexpr int kXSlice = kTokens * kDepth;
  static constexpr int kStage = kXSlice + kFeatures * kDepth;  // elements
  static_assert(kFeatureLanes * kTokenLanes == 32 && kFeatures % kDepth == 0);
  static_assert(kThreadFeatures % kQuad == 0 && kDepth % kQuad == 0);
};

// Steps through the list of one output block, past entries that are out of range. Every warp runs its own copy. With
// one list there is nothing to merge: what ColumnWalk does besides would take issue slots from the products.
//
// The 32 lanes hold a window of the list, the following window, and the ids of the one after that: order[i] and
// inner[order[i]] are two dependent loads, and each is issued one window before it is needed.
class ListWalk {
  static constexpr unsigned kAllLanes = 0xffffffffu;

 public:
  __device__ ListWalk(const MatmulParams& p, std::int64_t batch, std::int64_t column)
      : order_(p.order + batch * p.order_batch_stride),
        inner_(p.inner + batch * p.order_batch_stride),
        nnz_(p.nnz),
        rows_(static_cast<int>(CeilDiv(p.in_features, p.block))) {
    const std::int32_t* ptr = p.ptr + batch * p.ptr_batch_stride + column;
    const int first = max(0, min(__ldg(ptr), nnz_));
    end_ = max(0, min(__ldg(ptr + 1), nnz_));
    index_ = first + threadIdx.x % 32;
    windows_ = static_cast<int>(CeilDiv(max(0, static_cast<int>(end_) - first), 32));
    Refill();
    Refill();
    Next();
  }

  __device__ bool IsAtEnd() const { return row < 0; }

  // Moves to the next block.
  __device__ void Next() {
    while (left_ == 0 && windows_ > 0) {
      --windows_;
      Refill();
      left_ = __ballot_sync(kAllLanes, row_ >= 0);
    }
    const int lane = max(0, __ffs(left_) - 1);
    id = __shfl_sync(kAllLanes, id_, lane);
    row = left_ == 0 ? kNone : __shfl_sync(kAllLanes, row_, lane);
    left_ &= left_ - 1;
  }

  int id, row;

 private:
  static constexpr int kNone = -1;

  __device__ int RowOf(int id) const {
    if (id < 0 || id >= nnz_) return kNone;
    const int row = __ldg(inner_ + id);
    return row < rows_ ? row : kNone;
  }

  __device__ void Refill() {
    id_ = next_id_;
    row_ = next_row_;
    next_id_ = far_id_;
    next_row_ = RowOf(far_id_);
    far_id_ = index_ < end_ ? __ldg(order_ + index_) : kNone;
    index_ += 32;
  }

  const std::int32_t* order_;
  const std::int32_t* inner_;
  int nnz_;
  int rows_;
  std::uint32_t index_, end_;  // unsigned: may pass the end, and so 2^31
  int windows_;                // that are left
  std::uint32_t left_ = 0;     // lanes whose entries of the window are left
  int id_, row_;
  int next_id_ = kNone, next_row_ = kNone;
  int far_id_ = kNone;
};

// A piece of kRows x kCols elements of a row-major matrix and its copy in shared memory. If that is swizzled, the quads
// of a row are permuted so that the same quad of eight neighbouring rows (sixteen of 16-bit elements) falls into
// different banks.
template <typename T, int kRows, int kCols, bool kSwizzled, int kThreads>
class Piece {
  static constexpr int kRowQuads = kCols / kQuad;
  static constexpr int kEach = (kRows * kRowQuads + kThreads - 1) / kThreads;  // quads that a thread copies
  static constexpr int kStep = kThreads / kRowQuads;                           // rows that all threads copy at once
  static constexpr int kBankBytes = 128;
  static_assert(kThreads % kRowQuads == 0);
  static_assert(!kSwizzled || (kCols * int{sizeof(T)} <= kBankBytes && (kRowQuads & (kRowQuads - 1)) == 0));

 public:
  // What is xored to the column in a row. For the sum of two numbers of rows without a common bit, xor those of both.
  static __device__ __forceinline__ constexpr int Swizzle(int row) {
    return kSwizzled ? row / (kBankBytes / (kCols * int{sizeof(T)})) % kRowQuads * kQuad : 0;
  }

  // Copies the piece that begins at `from`, or some rows of it; then the others stay as they are.
  __device__ __forceinline__ void Copy(T* to, const T* from, int pitch, int rows = kRows) const {
    static_assert(kEach == 1 || Swizzle(kStep) == 0, "all quads of a thread are permuted alike");
    from += std::int64_t{row_} * pitch + col_;
    to += place_;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!IsIn(i) || (rows != kRows && row_ + i * kStep >= rows)) break;
      CopyAsync<kQuad * sizeof(T)>(SharedAddress(to + i * kStep * kCols), from);
      from += kStep * std::int64_t{pitch};
    }
  }

  // The same if not all of it exists, or not all quads are aligned. The rest becomes zeros.
  __device__ __forceinline__ void CopyPart(T* to, const T* from, int pitch, std::int64_t rows,
                                           std::int64_t cols) const {
    from += std::int64_t{row_} * pitch + col_;
    to += place_;
    for (int i = 0; i < kEach; ++i) {
      if (!IsIn(i)) break;
      CopyPartOfQuad(to + i * kStep * kCols, from, row_ + i * kStep < rows ? cols - col_ : 0);
      from += kStep * std::int64_t{pitch};
    }
  }

 private:
  __device__ __forceinline__ bool IsIn(int i) const {
    return kRows * kRowQuads % kThreads == 0 || row_ + i * kStep < kRows;
  }

  int row_ = threadIdx.x / kRowQuads, col_ = threadIdx.x % kRowQuads * kQuad;
  int place_ = row_ * kCols + (col_ ^ Swizzle(row_));
};

template <typename T, typename Tile, bool kTranspose>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas)
    MatmulSimtKernel(const __grid_constant__ MatmulParams p) {
  constexpr int kDepth = Tile::kDepth, kFeatures = Tile::kFeatures;
  using XPiece = Piece<T, Tile::kTokens, kDepth, true, Tile::kThreads>;
  using BlockPiece = std::conditional_t<kTranspose, Piece<T, kFeatures, kDepth, true, Tile::kThreads>,
                                        Piece<T, kDepth, kFeatures, false, Tile::kThreads>>;
  // Features of a thread that are neighbours. Where they are rows, two keep the lanes of a warp in different banks.
  constexpr int kGroup = kTranspose ? 2 : kQuad;
  constexpr bool kMayBeShort = Tile::kTokens <= 64;  // of tokens, and should be fast nevertheless
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);

  const std::int64_t token_tiles = CeilDiv(p.tokens, Tile::kTokens);
  const std::int64_t feature_tiles = CeilDiv(p.out_features, kFeatures);
  const std::int64_t batch = blockIdx.x / (token_tiles * feature_tiles);
  const std::int64_t tile = blockIdx.x % (token_tiles * feature_tiles);
  const std::int64_t first_token = tile / feature_tiles * Tile::kTokens;
  const std::int64_t first_feature = tile % feature_tiles * kFeatures;
  const int feature_in_block = static_cast<int>(first_feature % p.block);
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const int tokens = static_cast<int>(min(p.tokens - first_token, std::int64_t{Tile::kTokens}));  // that exist
  const bool x_fast = IsQuadAligned(x, p.in_features) && (kMayBeShort || tokens == Tile::kTokens);
  x += first_token * p.in_features;
  const T* data =
      static_cast<const T*>(p.data) + batch * p.data_batch_stride + feature_in_block * (kTranspose ? p.block : 1);

  const XPiece x_piece;
  const BlockPiece block_piece;
  ListWalk walk(p, batch, first_feature / p.block);
  int slice = 0;   // where in the block the next slice starts
  int copied = 0;  // slices

  // Starts to copy the next slice, if there is one. What lies outside of the matrix counts as zero, whatever a block
  // holds there; tokens that do not exist may be anything.
  const auto copy = [&](T* to) {
    if (!walk.IsAtEnd()) {
      const std::int64_t first_in = static_cast<std::int64_t>(walk.row) * p.block + slice;
      const std::int64_t depth = p.in_features - first_in;
      const T* block = data + static_cast<std::int64_t>(walk.id) * (p.block * p.block);
      block += kTranspose ? slice : slice * p.block;
      if (x_fast && depth >= kDepth) {
        x_piece.Copy(to, x + first_in, p.in_features, kMayBeShort ? tokens : Tile::kTokens);
      } else {
        x_piece.CopyPart(to, x + first_in, p.in_features, p.tokens - first_token, depth);
      }
      if (depth >= kDepth) {
        block_piece.Copy(to + Tile::kXSlice, block, p.block);
      } else {
        block_piece.CopyPart(to + Tile::kXSlice, block, p.block, kTranspose ? kFeatures : depth,
                             kTranspose ? depth : kFeatures);
      }
      ++copied;
      slice += kDepth;
      if (slice == p.block) {
        slice = 0;
        walk.Next();
      }
    }
    CommitCopies();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int feature_lane = lane % Tile::kFeatureLanes, token_lane = lane / Tile::kFeatureLanes;
  const int token = warp / Tile::kFeatureWarps * Tile::kWarpTokens + token_lane;
  const int feature = warp % Tile::kFeatureWarps * Tile::kWarpFeatures + feature_lane * kGroup;
  // The other features of this thread, counted from its first.
  const auto feature_offset = [](int n) { return n / kGroup * (Tile::kFeatureLanes * kGroup) + n % kGroup; };
  const int x_place = token * kDepth + XPiece::Swizzle(token);
  const int block_place = Tile::kXSlice + (kTranspose ? feature * kDepth + BlockPiece::Swizzle(feature) : feature);

  float sums[Tile::kThreadTokens][Tile::kThreadFeatures] = {};
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy(stages + stage * Tile::kStage);
  constexpr int kEnd = Tile::kStages * Tile::kStage;
  int stage = 0, next_stage = kEnd - Tile::kStage;
  for (int multiplied = 0; multiplied < copied; ++multiplied) {
    WaitForCopies<Tile::kStages - 2>();
    __syncthreads();
    copy(stages + next_stage);
    // A stage begins at a multiple of kDepth, so that what is xored does not touch its bits.
    const int own_x = stage + x_place, own_block = stage + block_place;
#pragma unroll 4
    for (int k = 0; k < kDepth; k += kQuad) {
      float a[Tile::kThreadTokens][kQuad], b[Tile::kThreadFeatures][kQuad];
#pragma unroll
      for (int m = 0; m < Tile::kThreadTokens; ++m) {
        const int rows = m * Tile::kTokenLanes;
        ReadQuad(a[m], stages + (own_x ^ k ^ XPiece::Swizzle(rows)) + rows * kDepth);
      }
      if constexpr (kTranspose) {
#pragma unroll
        for (int n = 0; n < Tile::kThreadFeatures; ++n) {
          const int rows = feature_offset(n);
          ReadQuad(b[n], stages + (own_block ^ k ^ BlockPiece::Swizzle(rows)) + rows * kDepth);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
#pragma unroll
          for (int n = 0; n < Tile::kThreadFeatures; n += kQuad) {
            float four[kQuad];
            ReadQuad(four, stages + own_block + (k + e) * kFeatures + feature_offset(n));
#pragma unroll
            for (int i = 0; i < kQuad; ++i) b[n + i][e] = four[i];
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
#pragma unroll
        for (int m = 0; m < Tile::kThreadTokens; ++m) {
#pragma unroll
          for (int n = 0; n < Tile::kThreadFeatures; ++n) sums[m][n] = fmaf(a[m][e], b[n][e], sums[m][n]);
        }
      }
    }
    stage = stage + Tile::kStage == kEnd ? 0 : stage + Tile::kStage;
    next_stage = next_stage + Tile::kStage == kEnd ? 0 : next_stage + Tile::kStage;
  }

  const auto write = [&](auto* y) {
    y += batch * p.tokens * p.out_features;
    const bool aligned = IsQuadAligned(y, p.out_features);
#pragma unroll
    for (int m = 0; m < Tile::kThreadTokens; ++m) {
      const std::int64_t row = first_token + token + m * Tile::kTokenLanes;
      if (row >= p.tokens) break;
#pragma unroll
      for (int n = 0; n < Tile::kThreadFeatures; n += kGroup) {
        float group[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group[i] = sums[m][n + i];
        const std::int64_t col = first_feature + feature + feature_offset(n);
        StoreGroup(y + row * p.out_features + col, group, p.out_features - col, aligned);
      }
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.y));
  } else {
    write(static_cast<T*>(p.y));
  }
}

template <typename T, typename Tile>
cudaError_t LaunchTile(const MatmulParams& p, cudaStream_t stream) {
  constexpr int kSharedBytes = Tile::kStages * Tile::kStage * sizeof(T);
  const std::int64_t ctas = p.batch * CeilDiv(p.tokens, Tile::kTokens) * CeilDiv(p.out_features, Tile::kFeatures);
  return p.transpose ? Launch<MatmulSimtKernel<T, Tile, true>>(p, ctas, Tile::kThreads, kSharedBytes, stream)
                     : Launch<MatmulSimtKernel<T, Tile, false>>(p, ctas, Tile::kThreads, kSharedBytes, stream);
}

// With few tokens, narrow columns and small tiles of sums: else there would be too few warps.
template <typename Tile>
cudaError_t LaunchUnlessFew(const MatmulParams& p, cudaStream_t stream) {
  using FewTokens = SimtMatmulTile<2, 1, 4, 4, 16, 16, 4, 8>;
  return p.tokens <= 2 * FewTokens::kTokens ? LaunchTile<float, FewTokens>(p, stream)
                                            : LaunchTile<float, Tile>(p, stream);
}

}  // namespace

cudaError_t LaunchMatmulSimt(const MatmulParams& params, cudaStream_t stream) {
  // Warps along tokens and features, sums of a lane, features of a warp, depth, stages, CTAs of an SM.
  using Blocks8 = SimtMatmulTile<1, 1, 4, 4, 8, 8, 4, 16>;
  using Blocks16 = SimtMatmulTile<1, 1, 8, 8, 16, 16, 2, 12>;
  using Blocks32 = SimtMatmulTile<4, 1, 8, 8, 32, 32, 2, 3>;
  using Blocks64 = SimtMatmulTile<2, 2, 8, 8, 32, 32, 3, 3>;
  if (params.type != ElementType::kF32) {
    if (params.block != 8) return cudaErrorInvalidValue;
    return params.type == ElementType::kBF16 ? LaunchTile<__nv_bfloat16, Blocks8>(params, stream)
                                             : LaunchTile<__half, Blocks8>(params, stream);
  }
  switch (params.block) {
    case 8:
      return LaunchTile<float, Blocks8>(params, stream);
    case 16:
      return LaunchUnlessFew<Blocks16>(params, stream);
    case 32:
      return LaunchUnlessFew<Blocks32>(params, stream);
    case 64:
    case 128:
      return LaunchUnlessFew<Blocks64>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
