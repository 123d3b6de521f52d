// The Python module jax_blocksparse._cpu.
#include <nanobind/nanobind.h>

#include "handlers.h"
#include "products.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
  m.doc() = "Host kernels of jax_blocksparse as XLA FFI handlers.";
  m.attr("XLA_FFI_API_VERSION") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def(
      "registrations",
      [] {
        nb::dict targets;
        targets["jax_blocksparse.matmul.v1"] = nb::capsule(reinterpret_cast<void*>(jax_blocksparse_matmul_cpu));
        targets["jax_blocksparse.sddmm.v1"] = nb::capsule(reinterpret_cast<void*>(jax_blocksparse_sddmm_cpu));
        return targets;
      },
      "FFI targets of this module: name -> capsule with the handler.");
  m.def(
      "isa", [] { return jax_blocksparse::selected_kernels().isa; },
      "Instruction set of the kernels in use: 'baseline', 'avx2' or 'avx512'.");
}
