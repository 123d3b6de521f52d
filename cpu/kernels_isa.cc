// All kernels for one instruction set; CMake compiles this file once for each, with JAX_BLOCKSPARSE_ISA as its name.
#include "matmul.h"
#include "products.h"
#include "sddmm.h"

#define JAX_BLOCKSPARSE_STRING_(x) #x
#define JAX_BLOCKSPARSE_STRING(x) JAX_BLOCKSPARSE_STRING_(x)
#define JAX_BLOCKSPARSE_JOIN_(x, y) x##y
#define JAX_BLOCKSPARSE_JOIN(x, y) JAX_BLOCKSPARSE_JOIN_(x, y)

namespace jax_blocksparse {

using namespace JAX_BLOCKSPARSE_ISA;  // NOLINT: the point of this file

// In the order of ElementType.
const KernelTable JAX_BLOCKSPARSE_JOIN(JAX_BLOCKSPARSE_ISA, _kernels) = {
    JAX_BLOCKSPARSE_STRING(JAX_BLOCKSPARSE_ISA),
    {{Matmul<float, float>::run, Matmul<float, float>::run},
     {Matmul<double, double>::run, Matmul<double, double>::run},
     {Matmul<BF16, BF16>::run, Matmul<BF16, float>::run},
     {Matmul<F16, F16>::run, Matmul<F16, float>::run}},
    {{Sddmm<float, float>::run, Sddmm<float, float>::run},
     {Sddmm<double, double>::run, Sddmm<double, double>::run},
     {Sddmm<BF16, BF16>::run, Sddmm<BF16, float>::run},
     {Sddmm<F16, F16>::run, Sddmm<F16, float>::run}},
};

}  // namespace jax_blocksparse
