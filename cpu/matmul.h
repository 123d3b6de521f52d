// y = x W and y = x W^T for one task: some rows of x, some output blocks.
#ifndef JAX_BLOCKSPARSE_CPU_MATMUL_H_
#define JAX_BLOCKSPARSE_CPU_MATMUL_H_

#include "microkernel.h"
#include "products.h"

namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA {

// Blocks of W are packed a few at a time: a strip of them stays in the first-level cache, all strips in the second.
inline constexpr int kMaxDepth = 256;
inline constexpr int kMaxBlocks = kMaxDepth / 8;
inline constexpr int blocks_per_chunk(int block) { return block == 128 ? 1 : kMaxDepth / block; }

// Packs one block as the k-th and following rows of each strip: strips[j / width][k][j % width] = W[k][j].
template <int kWidth, typename T>
JAX_BLOCKSPARSE_INLINE void pack_block(const T* w, int block, Accumulator<T>* strips, int64_t strip_pitch) {
  for (int k = 0; k < block; ++k) {
    for (int j = 0; j < block; j += kWidth) {
      widen(w + k * block + j, strips + j / kWidth * strip_pitch + k * kWidth, kWidth);
    }
  }
}

// The same of the block's transpose: strips[j / width][k][j % width] = W[j][k].
template <int kWidth, typename T>
JAX_BLOCKSPARSE_INLINE void pack_transposed_block(const T* w, int block, Accumulator<T>* strips, int64_t strip_pitch) {
  using Acc = Accumulator<T>;
  constexpr int kSide = 16 / sizeof(Acc);
  for (int j = 0; j < block; j += kSide) {
    Acc* to = strips + j / kWidth * strip_pitch + j % kWidth;
    for (int k = 0; k < block; k += kSide) {
      Vec<Acc, kSide> square[kSide];
      for (int i = 0; i < kSide; ++i) square[i] = load<kSide>(w + (j + i) * block + k);
      transpose(square);
      for (int i = 0; i < kSide; ++i) std::memcpy(to + (k + i) * kWidth, &square[i], sizeof(square[i]));
    }
  }
}

// The blocks one chunk of a sum is made of: ids and input blocks.
struct Chunk {
  int64_t id[kMaxBlocks];
  int64_t inner[kMaxBlocks];
  int count = 0;
};

// Moves up to `most` valid blocks from [*i, end) of the order into the chunk; index contents are not to be trusted.
inline void fill_chunk(const MatmulParams& args, int64_t g, int64_t* i, int64_t end, int most, Chunk* chunk) {
  const int32_t* order = args.order + g * args.order_batch_stride;
  const int32_t* inner = args.inner + g * args.order_batch_stride;
  const int64_t inner_blocks = CeilDiv(args.in_features, args.block);
  chunk->count = 0;
  for (; *i < end && chunk->count < most; ++*i) {
    const int64_t z = order[*i];
    if (z < 0 || z >= args.nnz) continue;
    const int64_t s = inner[z];
    if (s < 0 || s >= inner_blocks) continue;
    chunk->id[chunk->count] = z;
    chunk->inner[chunk->count++] = s;
  }
}

template <typename T, typename U>
struct Matmul {
  using Acc = Accumulator<T>;

  static void run(const MatmulParams& args, const MatmulTask& task, void* scratch) {
    with_strip<Acc>(args.block, [&](auto strip) {
      for (int64_t o = task.column; o < task.column + task.columns; ++o) {
        output_block<decltype(strip)>(args, task, o, static_cast<Acc*>(scratch));
      }
    });
  }

 private:
  // Sums the task's rows of output block o in scratch, a chunk of blocks at a time, and writes them to y.
  template <typename Strip>
  static void output_block(const MatmulParams& args, const MatmulTask& task, int64_t o, Acc* scratch) {
    Acc* sums = scratch;
    Acc* strips = scratch + kTile;
    Acc* widened = scratch + 2 * kTile;
    const int block = args.block;
    const int most = blocks_per_chunk(block);
    const int64_t strip_pitch = int64_t{most} * block * Strip::kWidth;
    const T* x = static_cast<const T*>(args.x) + task.g * args.x_batch_stride + task.row * args.in_features;
    const T* data = static_cast<const T*>(args.data) + task.g * args.data_batch_stride;
    const int32_t* ptr = args.ptr + task.g * args.ptr_batch_stride;

    bool any = false;
    Chunk chunk;
    int64_t i = clamp(ptr[o], args.nnz);
    const int64_t end = clamp(ptr[o + 1], args.nnz);
    while (fill_chunk(args, task.g, &i, end, most, &chunk), chunk.count > 0) {
      Segment<Acc> in_place[kMaxBlocks];
      const T* from[kMaxBlocks];
      int64_t depth = 0;
      for (int n = 0; n < chunk.count; ++n) {
        const T* w = data + chunk.id[n] * block * block;
        if (args.transpose) {
          pack_transposed_block<Strip::kWidth>(w, block, strips + depth * Strip::kWidth, strip_pitch);
        } else {
          pack_block<Strip::kWidth>(w, block, strips + depth * Strip::kWidth, strip_pitch);
        }
        const int64_t column = chunk.inner[n] * block;
        from[n] = x + column;
        in_place[n].k = args.in_features - column < block ? args.in_features - column : block;
        depth += in_place[n].k;
      }
      for_each_row_tile(task.rows, Strip::kMaxRows, [&](int64_t row, int rows) {
        const auto multiply = [&](const Segment<Acc>* segments, int count, RowMajor layout, int64_t first) {
          for (int j = 0; j < block; j += Strip::kWidth) {
            Strip::multiply(rows, segments, count, layout, first, strips + j / Strip::kWidth * strip_pitch,
                            sums + row * block + j, block, any);
          }
        };
        if constexpr (std::is_same_v<T, Acc>) {
          for (int n = 0; n < chunk.count; ++n) in_place[n].a = from[n];
          multiply(in_place, chunk.count, RowMajor{args.in_features}, row);
        } else {
          for (int r = 0; r < rows; ++r) {
            Acc* to = widened + r * kMaxDepth;
            for (int n = 0; n < chunk.count; to += in_place[n++].k) {
              widen(from[n] + (row + r) * args.in_features, to, in_place[n].k);
            }
          }
          const Segment<Acc> all{widened, depth};
          multiply(&all, 1, RowMajor{kMaxDepth}, 0);
        }
      });
      any = true;
    }

    const int64_t width = args.out_features - o * block < block ? args.out_features - o * block : block;
    U* y = static_cast<U*>(args.y) + (task.g * args.tokens + task.row) * args.out_features + o * block;
    for (int64_t r = 0; r < task.rows; ++r) {
      if (any) {
        narrow(sums + r * block, y + r * args.out_features, width);
      } else {
        std::memset(y + r * args.out_features, 0, width * sizeof(U));
      }
    }
  }

  static int64_t clamp(int64_t index, int64_t end) { return index < 0 ? 0 : index > end ? end : index; }
};

}  // namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA

#endif  // JAX_BLOCKSPARSE_CPU_MATMUL_H_
