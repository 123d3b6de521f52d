// The blocks of x^T dy by plain FMA, for float32 in any block size and for 16-bit elements in blocks of 8.
//
// A CTA computes one block, or a quarter of one of 128, over all tokens, some tokens at a time, which travel to shared
// memory by asynchronous copies, a slice or two ahead. A thread has a tile of 8 x 8 sums (4 x 4 for blocks of 8); where
// that takes fewer than all threads, the others take different tokens, and the sums are added at the end in a fixed
// order. What bounds it: issuing FMAs and other instructions for blocks of 32 and more; below, reading x and dy, from
// memory as soon as CTAs are no longer at the same tokens.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "simt_tile.cuh"

namespace jax_blocksparse {
namespace {

// kThreads threads compute a piece of kSide x kSide, each kTile x kTile sums of it for some of the tokens of a slice.
template <int kSideLength, int kTileLength, int kThreadCount, int kTokenCount, int kStageCount, int kCtaCount>
struct SimtSddmmTile {
  static constexpr int kSide = kSideLength;  // the block size, or 64 for blocks of 128
  static constexpr int kTile = kTileLength;  // of a thread's sums
  static constexpr int kThreads = kThreadCount;
  static constexpr int kTokens = kTokenCount;
  static constexpr int kStages = kStageCount;
  static constexpr int kCtas = kCtaCount;  // that an SM has registers for
  static constexpr int kSideThreads = kSide / kTile;
  static constexpr int kSplit = kThreads / (kSideThreads * kSideThreads);
  static constexpr int kRowQuads = kSide / kQuad;
  static constexpr int kStep = kThreads / kRowQuads;  // tokens that all threads copy at once
  static constexpr int kSlice = kTokens * kSide;      // elements of x, or of dy
  static_assert(kSideThreads * kSideThreads * kSplit == kThreads && kTokens % kSplit == 0);
  static_assert(kTile == kQuad || kTile == 2 * kQuad);
  static_assert(kThreads % kRowQuads == 0 && kTokens % kStep == 0);
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtas) SddmmSimtKernel(const __grid_constant__ SddmmParams p) {
  constexpr int kSide = Tile::kSide, kTile = Tile::kTile;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const stages = reinterpret_cast<T*>(shared);

  const int pieces_a_side = p.block / kSide;
  const int pieces = pieces_a_side * pieces_a_side;
  const int piece = static_cast<int>(blockIdx.x % pieces);
  const std::int64_t batch = blockIdx.x / pieces / p.nnz;
  const std::int64_t id = blockIdx.x / pieces % p.nnz;
  const int piece_row = piece / pieces_a_side * kSide, piece_col = piece % pieces_a_side * kSide;

  const int row = p.rows[batch * p.ids_batch_stride + id], col = p.cols[batch * p.ids_batch_stride + id];
  const std::int64_t first_row = static_cast<std::int64_t>(row) * p.block,
                     first_col = static_cast<std::int64_t>(col) * p.block;
  const bool inert = row < 0 || col < 0 || first_row >= p.in_features || first_col >= p.out_features;
  const std::int64_t steps = inert ? 0 : CeilDiv(p.tokens, Tile::kTokens);
  // How much of this piece exists; may be negative.
  const std::int64_t x_features = inert ? 0 : p.in_features - first_row - piece_row;
  const std::int64_t dy_features = inert ? 0 : p.out_features - first_col - piece_col;
  const T* x = static_cast<const T*>(p.x) + batch * p.x_batch_stride;
  const T* dy = static_cast<const T*>(p.dy) + batch * p.dy_batch_stride;
  const bool whole = IsQuadAligned(x, p.in_features) && IsQuadAligned(dy, p.out_features) && x_features >= kSide &&
                     dy_features >= kSide;

  const int thread = threadIdx.x;
  const int copy_row = thread / Tile::kRowQuads, copy_col = thread % Tile::kRowQuads * kQuad;
  const int copy_place = copy_row * kSide + copy_col;
  x += copy_row * std::int64_t{p.in_features} + first_row + piece_row + copy_col;
  dy += copy_row * std::int64_t{p.out_features} + first_col + piece_col + copy_col;
  std::int64_t next = 0;  // the step to copy

  // Starts to copy the next slice, if there is one. What does not exist becomes zeros.
  const auto copy = [&](T* to) {
    if (next < steps) {
      const std::int64_t left = p.tokens - next * Tile::kTokens;
      to += copy_place;
      if (whole && left >= Tile::kTokens) {
        const T *from_x = x, *from_dy = dy;
#pragma unroll
        for (int i = 0; i < Tile::kTokens; i += Tile::kStep) {
          CopyAsync<kQuad * sizeof(T)>(SharedAddress(to + i * kSide), from_x);
          CopyAsync<kQuad * sizeof(T)>(SharedAddress(to + Tile::kSlice + i * kSide), from_dy);
          from_x += Tile::kStep * std::int64_t{p.in_features};
          from_dy += Tile::kStep * std::int64_t{p.out_features};
        }
      } else {
        for (int i = 0; i < Tile::kTokens; i += Tile::kStep) {
          const bool exists = copy_row + i < left;
          CopyPartOfQuad(to + i * kSide, x + i * std::int64_t{p.in_features}, exists ? x_features - copy_col : 0);
          CopyPartOfQuad(to + Tile::kSlice + i * kSide, dy + i * std::int64_t{p.out_features},
                         exists ? dy_features - copy_col : 0);
        }
      }
      ++next;
      x += Tile::kTokens * std::int64_t{p.in_features};
      dy += Tile::kTokens * std::int64_t{p.out_features};
    }
    CommitCopies();
  };

  const int split = thread / (Tile::kSideThreads * Tile::kSideThreads);
  const int row_thread = thread / Tile::kSideThreads % Tile::kSideThreads, col_thread = thread % Tile::kSideThreads;
  // The rows and columns of a thread are one quad or two, half of a side apart. Threads whose tokens lie in the same
  // banks begin with different ones.
  constexpr int kRowsOfBanks = std::max(1, 32 / kSide);
  const int first_quad = kTile == kQuad ? 0 : split / kRowsOfBanks % 2 * (kSide / 2);
  const int own_row = first_quad ^ row_thread * kQuad, own_col = first_quad ^ col_thread * kQuad;
  float sums[kTile][kTile] = {};
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy(stages + stage * 2 * Tile::kSlice);
  constexpr int kEnd = Tile::kStages * 2 * Tile::kSlice;
  int stage = 0, next_stage = kEnd - 2 * Tile::kSlice;
  for (std::int64_t step = 0; step < steps; ++step) {
    WaitForCopies<Tile::kStages - 2>();
    __syncthreads();
    copy(stages + next_stage);
    const T* const x_slice = stages + stage + split * kSide;
    const T* const dy_slice = x_slice + Tile::kSlice;
#pragma unroll 8
    for (int k = 0; k < Tile::kTokens; k += Tile::kSplit) {
      float a[kTile], b[kTile];
#pragma unroll
      for (int i = 0; i < kTile; i += kQuad) {
        ReadQuad(a + i, x_slice + k * kSide + (own_row ^ i / kQuad * (kSide / 2)));
        ReadQuad(b + i, dy_slice + k * kSide + (own_col ^ i / kQuad * (kSide / 2)));
      }
#pragma unroll
      for (int m = 0; m < kTile; ++m) {
#pragma unroll
        for (int n = 0; n < kTile; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
      }
    }
    stage = stage + 2 * Tile::kSlice == kEnd ? 0 : stage + 2 * Tile::kSlice;
    next_stage = next_stage + 2 * Tile::kSlice == kEnd ? 0 : next_stage + 2 * Tile::kSlice;
  }

  // Through shared memory: adds up the partial sums, and makes the writes contiguous.
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < kTile; ++m) {
#pragma unroll
    for (int n = 0; n < kTile; ++n) {
      const int place_row = (own_row ^ m / kQuad * (kSide / 2)) + m % kQuad;
      const int place_col = (own_col ^ n / kQuad * (kSide / 2)) + n % kQuad;
      partial[(split * kSide + place_row) * kSide + place_col] = sums[m][n];
    }
  }
  __syncthreads();
  const auto write = [&](auto* data) {
    data += (batch * p.nnz + id) * p.block * p.block + piece_row * p.block + piece_col;
    for (int i = thread; i < kSide * kSide; i += Tile::kThreads) {
      float sum = 0.0f;
      for (int s = 0; s < Tile::kSplit; ++s) sum += partial[s * kSide * kSide + i];
      const int r = i / kSide, c = i % kSide;
      FromFloat(r < x_features && c < dy_features ? sum : 0.0f, data + r * p.block + c);
    }
  };
  if (p.f32_output) {
    write(static_cast<float*>(p.data));
  } else {
    write(static_cast<T*>(p.data));
  }
}

template <typename T, typename Tile>
cudaError_t LaunchTile(const SddmmParams& p, cudaStream_t stream) {
  constexpr int kSide = Tile::kSide;
  constexpr int kSharedBytes =
      std::max(Tile::kStages * 2 * Tile::kSlice * int{sizeof(T)}, Tile::kSplit * kSide * kSide * 4);
  const std::int64_t pieces_a_side = p.block / kSide;
  return Launch<SddmmSimtKernel<T, Tile>>(p, p.batch * p.nnz * pieces_a_side * pieces_a_side, Tile::kThreads,
                                          kSharedBytes, stream);
}

}  // namespace

cudaError_t LaunchSddmmSimt(const SddmmParams& params, cudaStream_t stream) {
  // Side of a piece and of a lane's sums, threads, tokens of a slice, stages, CTAs of an SM.
  using Blocks8 = SimtSddmmTile<8, 4, 32, 64, 3, 16>;
  using Blocks16 = SimtSddmmTile<16, 8, 32, 64, 2, 12>;
  using Blocks32 = SimtSddmmTile<32, 8, 64, 32, 3, 6>;
  using Blocks64 = SimtSddmmTile<64, 8, 128, 16, 3, 3>;
  if (params.type != ElementType::kF32) {
    if (params.block != 8) return cudaErrorInvalidValue;
    return params.type == ElementType::kBF16 ? LaunchTile<__nv_bfloat16, Blocks8>(params, stream)
                                             : LaunchTile<__half, Blocks8>(params, stream);
  }
  switch (params.block) {
    case 8:
      return LaunchTile<float, Blocks8>(params, stream);
    case 16:
      return LaunchTile<float, Blocks16>(params, stream);
    case 32:
      return LaunchTile<float, Blocks32>(params, stream);
    case 64:
    case 128:
      return LaunchTile<float, Blocks64>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse
