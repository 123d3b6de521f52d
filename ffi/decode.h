// From the buffers that XLA hands to a custom call to the parameters of a product, or to an error that says what is
// wrong with them: the operand, what it has and what it should have. Index contents are not looked at.
#pragma once

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_blocksparse {

using Indices = xla::ffi::Buffer<xla::ffi::S32, 2>;

xla::ffi::ErrorOr<MatmulParams> DecodeMatmul(const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& data,
                                             const Indices& ptr, const Indices& order, const Indices& inner,
                                             xla::ffi::AnyBuffer& y, bool transpose);

xla::ffi::ErrorOr<SddmmParams> DecodeSddmm(const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& dy,
                                           const Indices& rows, const Indices& cols, xla::ffi::AnyBuffer& data);

}  // namespace jax_blocksparse
