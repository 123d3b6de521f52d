// The XLA custom calls of this module.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_blocksparse {

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxBlocksparseMatmulCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxBlocksparseSddmmCuda);

}  // namespace jax_blocksparse
