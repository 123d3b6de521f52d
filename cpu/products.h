// The two products as the handlers see them: plain arguments, tasks, and one table of functions per instruction set.
#ifndef JAX_BLOCKSPARSE_CPU_PRODUCTS_H_
#define JAX_BLOCKSPARSE_CPU_PRODUCTS_H_

#include <cstddef>
#include <cstdint>

namespace jax_blocksparse {

enum class DType { kF32, kF64, kBF16, kF16 };
inline constexpr int kDTypes = 4;

// Block b of a matrix of `size` rows (or columns) starts at b * block; the last block may reach beyond the end.
inline constexpr int64_t blocks_along(int64_t size, int64_t block) { return (size + block - 1) / block; }

// y[g] = x[g] W[g] or x[g] W[g]^T, W given by its blocks; the contract of the FFI target "jax_blocksparse.matmul.v1".
// A batch stride of 0 shares the operand. Strides count elements.
struct MatmulArgs {
  const void* x;         // (M, C)
  const void* data;      // (nnz, block, block)
  const int32_t* ptr;    // (blocks_along(O) + 1): which stretch of `order` belongs to an output block
  const int32_t* order;  // (nnz): ids of blocks
  const int32_t* inner;  // (nnz): the input block that block z is applied to
  void* y;               // (M, O)
  int64_t x_stride, data_stride, ptr_stride, pattern_stride;
  int64_t M, C, O, nnz;
  int block;
  bool transpose;
};

// A task computes rows [row, row + rows) of output blocks [column, column + columns) of batch element g.
struct MatmulTask {
  int64_t g, row, rows, column, columns;
};

// data[g, z] = the block (rows[z], cols[z]) of x[g]^T dy[g]; the contract of "jax_blocksparse.sddmm.v1".
struct SddmmArgs {
  const void* x;        // (M, K)
  const void* dy;       // (M, N)
  const int32_t* rows;  // (nnz)
  const int32_t* cols;  // (nnz)
  void* data;           // (nnz, block, block)
  int64_t x_stride, dy_stride, pattern_stride;
  int64_t M, K, N, nnz;
  int block;
};

// A task computes blocks [id, id + ids) of batch element g.
struct SddmmTask {
  int64_t g, id, ids;
};

// Limits of one task, set by the scratch memory a thread has: three areas of kTile accumulators.
inline constexpr int64_t kTile = 128 * 128;
inline constexpr std::size_t kScratchBytes = 3 * kTile * sizeof(double);
inline constexpr int64_t max_rows_per_task(int block) { return block == 128 ? 128 : 192; }
inline constexpr int64_t max_ids_per_task(int block) { return kTile / (int64_t{block} * block); }

using MatmulFn = void (*)(const MatmulArgs&, const MatmulTask&, void* scratch);
using SddmmFn = void (*)(const SddmmArgs&, const SddmmTask&, void* scratch);

// The kernels of one instruction set. `scratch` is kScratchBytes long and aligned to a cache line.
// The second index says whether a 16-bit product is written as f32 (it has no meaning for f32 and f64).
struct KernelTable {
  const char* isa;
  MatmulFn matmul[kDTypes][2];
  SddmmFn sddmm[kDTypes][2];
};

extern const KernelTable baseline_kernels;
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;

// The best table this machine can run, or a lesser one named by the environment variable JAX_BLOCKSPARSE_CPU_ISA.
const KernelTable& selected_kernels();

}  // namespace jax_blocksparse

#endif  // JAX_BLOCKSPARSE_CPU_PRODUCTS_H_
