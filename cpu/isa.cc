// Picks the instruction set once, at first use.
#include <cstdlib>
#include <cstring>

#include "products.h"

namespace jax_blocksparse {
namespace {

const KernelTable& select_kernels() {
#if defined(JAX_BLOCKSPARSE_X86)
  // The variable only lowers the choice: tests use it to run every path a machine has.
  const char* wanted = std::getenv("JAX_BLOCKSPARSE_CPU_ISA");
  const auto allows = [wanted](const char* isa) { return wanted == nullptr || std::strcmp(wanted, isa) == 0; };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allows("avx512")) return avx512_kernels;
  if (avx2 && (allows("avx2") || allows("avx512"))) return avx2_kernels;
#endif
  return baseline_kernels;
}

}  // namespace

const KernelTable& selected_kernels() {
  static const KernelTable& kernels = select_kernels();
  return kernels;
}

}  // namespace jax_blocksparse
