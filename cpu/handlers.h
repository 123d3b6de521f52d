// The FFI handlers of the CPU module.
#ifndef JAX_BLOCKSPARSE_CPU_HANDLERS_H_
#define JAX_BLOCKSPARSE_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_blocksparse_matmul_cpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jax_blocksparse_sddmm_cpu);

#endif  // JAX_BLOCKSPARSE_CPU_HANDLERS_H_
