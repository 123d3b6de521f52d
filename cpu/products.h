// What the kernels offer to the handlers: tasks, and one table of functions per instruction set.
#ifndef JAX_BLOCKSPARSE_CPU_PRODUCTS_H_
#define JAX_BLOCKSPARSE_CPU_PRODUCTS_H_

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace jax_blocksparse {

// A task computes rows [row, row + rows) of output blocks [column, column + columns) of batch element g.
struct MatmulTask {
  int64_t g, row, rows, column, columns;
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

using MatmulFn = void (*)(const MatmulParams&, const MatmulTask&, void* scratch);
using SddmmFn = void (*)(const SddmmParams&, const SddmmTask&, void* scratch);

// The kernels of one instruction set. `scratch` is kScratchBytes long and aligned to a cache line.
// The first index is the ElementType, the second says whether a 16-bit product is written as f32.
struct KernelTable {
  const char* isa;
  MatmulFn matmul[4][2];
  SddmmFn sddmm[4][2];
};

extern const KernelTable baseline_kernels;
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;

// The best table this machine can run, or a lesser one named by the environment variable JAX_BLOCKSPARSE_CPU_ISA.
const KernelTable& selected_kernels();

}  // namespace jax_blocksparse

#endif  // JAX_BLOCKSPARSE_CPU_PRODUCTS_H_
