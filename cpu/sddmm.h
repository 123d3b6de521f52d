// The blocks of x^T dy for one task: a short run of block ids.
#ifndef JAX_BLOCKSPARSE_CPU_SDDMM_H_
#define JAX_BLOCKSPARSE_CPU_SDDMM_H_

#include "microkernel.h"
#include "products.h"

namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA {

// Tokens (rows of x and dy) are taken a chunk at a time, so that the packed blocks stay in cache.
inline constexpr int64_t kMaxTokens = 128;

// Block column `index` of a chunk of a matrix with `columns` columns, packed in strips: strips[j / width][token][j %
// width]; columns beyond the matrix are left as they are. Remembers what it holds: ids next to each other often share
// their row or their column.
template <typename T, int kWidth>
class PackedBlock {
 public:
  using Acc = Accumulator<T>;

  PackedBlock(Acc* strips, int block) : strips_(strips), block_(block) {}

  void forget() { held_ = -1; }

  void hold(const T* matrix, int64_t columns, int64_t index, int64_t tokens) {
    if (index == held_) return;
    held_ = index;
    for (int j = 0; j < block_; j += kWidth) {
      const int64_t column = index * block_ + j;
      Acc* to = strips_ + j * kMaxTokens;
      if (column + kWidth <= columns) {
        for (int64_t t = 0; t < tokens; ++t) widen(matrix + t * columns + column, to + t * kWidth, kWidth);
      } else if (column < columns) {
        for (int64_t t = 0; t < tokens; ++t) widen(matrix + t * columns + column, to + t * kWidth, columns - column);
      }
    }
  }

  const Acc* strip(int column) const { return strips_ + column * kMaxTokens; }

 private:
  Acc* strips_;
  int block_;
  int64_t held_ = -1;
};

template <typename T, typename U>
struct Sddmm {
  using Acc = Accumulator<T>;

  static void run(const SddmmParams& args, const SddmmTask& task, void* scratch) {
    with_strip<Acc>(args.block, [&](auto strip) { blocks<decltype(strip)>(args, task, static_cast<Acc*>(scratch)); });
  }

 private:
  template <typename Strip>
  static void blocks(const SddmmParams& args, const SddmmTask& task, Acc* scratch) {
    constexpr int kWidth = Strip::kWidth;
    const int block = args.block;
    const int64_t size = int64_t{block} * block;
    Acc* sums = scratch;
    PackedBlock<T, kWidth> x_block(scratch + kTile, block), dy_block(scratch + 2 * kTile, block);
    const T* x = static_cast<const T*>(args.x) + task.g * args.x_batch_stride;
    const T* dy = static_cast<const T*>(args.dy) + task.g * args.dy_batch_stride;
    const int32_t* rows = args.rows + task.g * args.ids_batch_stride + task.id;
    const int32_t* cols = args.cols + task.g * args.ids_batch_stride + task.id;
    const int64_t row_blocks = CeilDiv(args.in_features, block), col_blocks = CeilDiv(args.out_features, block);
    const auto is_valid = [&](int64_t z) {
      return rows[z] >= 0 && rows[z] < row_blocks && cols[z] >= 0 && cols[z] < col_blocks;
    };

    for (int64_t token = 0; token < args.tokens; token += kMaxTokens) {
      const int64_t tokens = args.tokens - token < kMaxTokens ? args.tokens - token : kMaxTokens;
      x_block.forget();
      dy_block.forget();
      for (int64_t z = 0; z < task.ids; ++z) {
        if (!is_valid(z)) continue;
        x_block.hold(x + token * args.in_features, args.in_features, rows[z], tokens);
        dy_block.hold(dy + token * args.out_features, args.out_features, cols[z], tokens);
        for (int j = 0; j < block; j += kWidth) {
          for (int i = 0; i < block; i += kWidth) {
            const Segment<Acc> all{x_block.strip(i), tokens};
            for_each_row_tile(kWidth, Strip::kMaxRows, [&](int64_t row, int tile) {
              Strip::multiply(tile, &all, 1, ColumnMajor{kWidth}, row, dy_block.strip(j),
                              sums + z * size + (i + row) * block + j, block, token > 0);
            });
          }
        }
      }
    }

    U* data = static_cast<U*>(args.data) + (task.g * args.nnz + task.id) * size;
    for (int64_t z = 0; z < task.ids; ++z) {
      const bool empty = args.tokens == 0 || !is_valid(z);
      const int64_t height = empty ? 0 : args.in_features - int64_t{rows[z]} * block;
      const int64_t width = empty ? 0 : args.out_features - int64_t{cols[z]} * block;
      write_block(sums + z * size, block, height, width, data + z * size);
    }
  }

  // Entries outside the matrix, at or beyond (height, width), are zeros whatever was summed there.
  static void write_block(const Acc* sums, int block, int64_t height, int64_t width, U* data) {
    for (int i = 0; i < block; ++i) {
      const int64_t inside = i >= height ? 0 : width < block ? width : block;
      narrow(sums + i * block, data + i * block, inside);
      std::memset(data + i * block + inside, 0, (block - inside) * sizeof(U));
    }
  }
};

}  // namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA

#endif  // JAX_BLOCKSPARSE_CPU_SDDMM_H_
