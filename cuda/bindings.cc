// The Python module jax_blocksparse._cuda: capsules for jax.ffi.register_ffi_target, nothing else. It links no CUDA
// library, so it imports on machines without a GPU or its driver.
#include <nanobind/nanobind.h>

#include "handlers.h"

namespace nb = nanobind;

NB_MODULE(_cuda, module) {
  module.attr("XLA_FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.def("registrations", [] {
    nb::dict targets;
    targets["jax_blocksparse.matmul.v1"] =
        nb::capsule(reinterpret_cast<void*>(jax_blocksparse::JaxBlocksparseMatmulCuda));
    targets["jax_blocksparse.sddmm.v1"] =
        nb::capsule(reinterpret_cast<void*>(jax_blocksparse::JaxBlocksparseSddmmCuda));
    return targets;
  });
}
