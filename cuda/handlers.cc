// The XLA custom calls: check the operands and run the product.
#include "handlers.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "decode.h"
#include "dispatch.h"
#include "kernels.h"

namespace jax_blocksparse {
namespace {

namespace ffi = ::xla::ffi;
using Stream = ffi::PlatformStream<cudaStream_t>;
using Bias = ffi::Buffer<ffi::F32, 2>;
using ColumnSums = ffi::Buffer<ffi::F32, 3>;

// What every kernel here asks of a product beyond what decoding has checked.
ffi::Error CheckSupported(const char* target, ElementType type, const void* data) {
  if (type == ElementType::kF64) {
    return ffi::Error::InvalidArgument(std::string(target) + ": x has element type f64, for which there is no kernel");
  }
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0) {
    return ffi::Error::InvalidArgument(std::string(target) + ": data must start at a multiple of 16 bytes");
  }
  return ffi::Error::Success();
}

ffi::Error LaunchResult(const char* target, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  const std::string message = std::string(target) + ": " + cudaGetErrorString(error) +
                              " (a launch also reports what an earlier kernel did wrong)";
  return error == cudaErrorInvalidConfiguration ? ffi::Error::InvalidArgument(message) : ffi::Error::Internal(message);
}

// Adds what the Hopper kernels need to a product whose own operands are known to fit.
ffi::ErrorOr<MatmulPlan> DecodePlan(const char* target, const MatmulParams& params, const Indices& plan,
                                    ffi::AnyBuffer& workspace, std::int32_t tile_features, std::int32_t capacity) {
  const auto error = [&](const char* what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string(target) + ": " + what));
  };
  MatmulPlan decoded;
  if ((tile_features != 128 && tile_features != 256) || capacity < 1) {
    return error("tile_features must be 128 or 256 and capacity positive");
  }
  decoded.plan = plan.typed_data();
  decoded.batch = plan.dimensions()[0];
  decoded.tile_features = tile_features;
  decoded.capacity = capacity;
  decoded.layout = PlanLayoutOf(params, tile_features, capacity);
  if ((decoded.batch != 1 && decoded.batch != params.batch) || plan.dimensions()[1] != decoded.layout.size) {
    return error("plan has another shape than pattern, tile_features and capacity imply");
  }
  const bool data_is_shared = params.data_batch_stride == 0 && decoded.batch == 1;
  const std::int64_t element = Is16Bit(params.type) ? 2 : 4;
  const std::int64_t data_bytes =
      (data_is_shared ? 1 : params.batch) * params.nnz * params.block * params.block * element;
  const std::int64_t x_bytes = (params.x_batch_stride == 0 ? 1 : params.batch) * PackedXElements(params) * element;
  if (const auto size = static_cast<std::int64_t>(workspace.size_bytes()); size != 0) {
    const bool is_small_batch = params.tokens <= kFewTokens;
    if (size != data_bytes && !(is_small_batch && size == x_bytes)) {
      return error("workspace must be as large as data, or for few tokens as packed x");
    }
    // A program for any number of tokens has room for the blocks, of which few tokens make no use.
    if (!is_small_batch || size != data_bytes) decoded.workspace = workspace.untyped_data();
  }
  // Without room to pack, blocks are left to the kernels that take them as they are.
  if (NeedsPacking(params) && decoded.workspace == nullptr) decoded.plan = nullptr;
  return decoded;
}

ffi::ErrorOr<Epilogue> DecodeEpilogue(const char* target, const MatmulParams& params, std::int32_t activation,
                                      const Bias& bias, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& y,
                                      ffi::AnyBuffer& slope, ColumnSums& column_sums) {
  const auto error = [&](const char* what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string(target) + ": " + what));
  };
  Epilogue decoded;
  if (activation < 0 || activation > static_cast<std::int32_t>(Activation::kSilu)) return error("no such activation");
  decoded.activation = static_cast<Activation>(activation);
  if (bias.element_count() != 0) {
    const auto dims = bias.dimensions();
    if ((dims[0] != 1 && dims[0] != params.batch) || dims[1] != params.out_features) {
      return error("bias must have shape (batch or 1, features of y)");
    }
    decoded.bias = bias.typed_data();
    decoded.bias_batch_stride = dims[0] == 1 ? 0 : params.out_features;
  }
  if (scale.element_count() != 0) {
    const auto dims = scale.dimensions(), y_dims = y.dimensions();
    if (dims.size() != 3 || (dims[0] != 1 && dims[0] != y_dims[0]) || dims[1] != y_dims[1] || dims[2] != y_dims[2] ||
        scale.element_type() != y.element_type()) {
      return error("scale must have the shape and element type of y, or 1 in front");
    }
    decoded.scale = scale.untyped_data();
    decoded.scale_batch_stride = dims[0] == 1 ? 0 : params.tokens * params.out_features;
  }
  if (slope.element_count() != 0) {
    if (slope.element_count() != y.element_count() || slope.element_type() != y.element_type()) {
      return error("slope must have the shape and element type of y");
    }
    decoded.slope = slope.untyped_data();
  }
  if (column_sums.element_count() != 0) {
    if (static_cast<std::int64_t>(column_sums.element_count()) !=
            params.batch * CeilDiv(params.tokens, kSumTokens) * params.out_features ||
        decoded.bias != nullptr || decoded.activation != Activation::kNone) {
      return error(
          "column_sums must have shape (batch, tokens / 64, features of y), and there be no bias, no activation");
    }
    decoded.column_sums = column_sums.typed_data();
  }
  return decoded;
}

ffi::Error Matmul(cudaStream_t stream, bool transpose, bool tf32, std::int32_t activation, std::int32_t tile_features,
                  std::int32_t capacity, ffi::AnyBuffer x, ffi::AnyBuffer data, Indices ptr, Indices order,
                  Indices inner, Indices plan, Bias bias, ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> y,
                  ffi::Result<ffi::AnyBuffer> slope, ffi::Result<ColumnSums> column_sums,
                  ffi::Result<ffi::AnyBuffer> workspace) {
  constexpr char kTarget[] = "jax_blocksparse.matmul";
  auto params = DecodeMatmul(x, data, ptr, order, inner, *y, transpose);
  if (params.has_error()) return params.error();
  params->tf32 = tf32;
  if (y->element_count() == 0) return ffi::Error::Success();
  if (const ffi::Error error = CheckSupported(kTarget, params->type, params->data); error.failure()) return error;
  const auto decoded = DecodePlan(kTarget, *params, plan, *workspace, tile_features, capacity);
  if (decoded.has_error()) return decoded.error();
  const auto epilogue = DecodeEpilogue(kTarget, *params, activation, bias, scale, *y, *slope, *column_sums);
  if (epilogue.has_error()) return epilogue.error();
  return LaunchResult(kTarget, Run(*params, *decoded, *epilogue, stream));
}

ffi::ErrorOr<SddmmPlan> DecodePlan(const char* target, const SddmmParams& params, const Indices& plan,
                                   std::int32_t unit, std::int32_t split, std::int32_t tiles) {
  const auto error = [&](const char* what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string(target) + ": " + what));
  };
  const bool is_unit = unit == 16 || unit == 32 || unit == 64 || unit == 128;
  if (!is_unit || unit % params.block != 0 || split < 1 || split > sm90::kMaxSddmmSplit || tiles < 0) {
    return error("unit must be 16, 32, 64 or 128 and a multiple of the block, split 1 to 5 and tiles not negative");
  }
  SddmmPlan decoded;
  decoded.plan = plan.typed_data();
  decoded.batch = plan.dimensions()[0];
  decoded.unit = unit;
  decoded.split = split;
  decoded.layout = SddmmPlanLayoutOf(params, unit, tiles);
  if ((decoded.batch != 1 && decoded.batch != params.batch) || plan.dimensions()[1] != decoded.layout.size) {
    return error("plan has another shape than pattern, unit and tiles imply");
  }
  return decoded;
}

ffi::Error Sddmm(cudaStream_t stream, bool tf32, std::int32_t unit, std::int32_t split, std::int32_t tiles,
                 ffi::AnyBuffer x, ffi::AnyBuffer dy, Indices rows, Indices cols, Indices plan,
                 ffi::Result<ffi::AnyBuffer> data) {
  constexpr char kTarget[] = "jax_blocksparse.sddmm";
  auto params = DecodeSddmm(x, dy, rows, cols, *data);
  if (params.has_error()) return params.error();
  params->tf32 = tf32;
  if (data->element_count() == 0) return ffi::Error::Success();
  if (const ffi::Error error = CheckSupported(kTarget, params->type, params->data); error.failure()) return error;
  const auto decoded = DecodePlan(kTarget, *params, plan, unit, split, tiles);
  if (decoded.has_error()) return decoded.error();
  return LaunchResult(kTarget, Run(*params, *decoded, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseMatmulCuda, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Attr<bool>("transpose")
                                  .Attr<bool>("tf32")
                                  .Attr<std::int32_t>("activation")
                                  .Attr<std::int32_t>("tile_features")
                                  .Attr<std::int32_t>("capacity")
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // data
                                  .Arg<Indices>()          // ptr
                                  .Arg<Indices>()          // order
                                  .Arg<Indices>()          // inner
                                  .Arg<Indices>()          // plan
                                  .Arg<Bias>()             // bias
                                  .Arg<ffi::AnyBuffer>()   // scale
                                  .Ret<ffi::AnyBuffer>()   // y
                                  .Ret<ffi::AnyBuffer>()   // slope
                                  .Ret<ColumnSums>()       // column_sums
                                  .Ret<ffi::AnyBuffer>(),  // workspace
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseSddmmCuda, Sddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Attr<bool>("tf32")
                                  .Attr<std::int32_t>("unit")
                                  .Attr<std::int32_t>("split")
                                  .Attr<std::int32_t>("tiles")
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // dy
                                  .Arg<Indices>()          // rows
                                  .Arg<Indices>()          // cols
                                  .Arg<Indices>()          // plan
                                  .Ret<ffi::AnyBuffer>(),  // data
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_blocksparse
