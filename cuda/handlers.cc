// The XLA custom calls: choose a kernel for the product and launch it.
#include "handlers.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "decode.h"
#include "kernels.h"

namespace jax_blocksparse {
namespace {

namespace ffi = ::xla::ffi;
using Stream = ffi::PlatformStream<cudaStream_t>;

bool UsesTensorCores(ElementType type, int block) { return type != ElementType::kF32 && block >= 16; }

// Large tiles reuse more, but only if there are enough of them for every SM.
TileSize ChooseTileSize(std::int64_t large_ctas, int sm_count) {
  return large_ctas < sm_count ? TileSize::kSmall : TileSize::kLarge;
}

cudaError_t SmCount(int* count) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

cudaError_t ChooseAndLaunch(const MatmulParams& params, cudaStream_t stream) {
  if (!UsesTensorCores(params.type, params.block)) return LaunchMatmulSimt(params, stream);
  int sm_count;
  if (const cudaError_t error = SmCount(&sm_count); error != cudaSuccess) return error;
  // Half of a large tile would be empty up to 64 tokens.
  const TileSize size =
      params.tokens <= 64 ? TileSize::kSmall : ChooseTileSize(MatmulMmaCtas(params, TileSize::kLarge), sm_count);
  return params.type == ElementType::kBF16 ? LaunchMatmulMmaBF16(params, size, stream)
                                           : LaunchMatmulMmaF16(params, size, stream);
}

cudaError_t ChooseAndLaunch(const SddmmParams& params, cudaStream_t stream) {
  if (!UsesTensorCores(params.type, params.block)) return LaunchSddmmSimt(params, stream);
  int sm_count;
  if (const cudaError_t error = SmCount(&sm_count); error != cudaSuccess) return error;
  const TileSize size = ChooseTileSize(SddmmMmaCtas(params, TileSize::kLarge), sm_count);
  return params.type == ElementType::kBF16 ? LaunchSddmmMmaBF16(params, size, stream)
                                           : LaunchSddmmMmaF16(params, size, stream);
}

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

ffi::Error Matmul(cudaStream_t stream, bool transpose, ffi::AnyBuffer x, ffi::AnyBuffer data, Indices ptr,
                  Indices order, Indices inner, ffi::Result<ffi::AnyBuffer> y) {
  constexpr char kTarget[] = "jax_blocksparse.matmul";
  const auto params = DecodeMatmul(x, data, ptr, order, inner, *y, transpose);
  if (params.has_error()) return params.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  if (const ffi::Error error = CheckSupported(kTarget, params->type, params->data); error.failure()) return error;
  return LaunchResult(kTarget, ChooseAndLaunch(*params, stream));
}

ffi::Error Sddmm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer dy, Indices rows, Indices cols,
                 ffi::Result<ffi::AnyBuffer> data) {
  constexpr char kTarget[] = "jax_blocksparse.sddmm";
  const auto params = DecodeSddmm(x, dy, rows, cols, *data);
  if (params.has_error()) return params.error();
  if (data->element_count() == 0) return ffi::Error::Success();
  if (const ffi::Error error = CheckSupported(kTarget, params->type, params->data); error.failure()) return error;
  return LaunchResult(kTarget, ChooseAndLaunch(*params, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseMatmulCuda, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Attr<bool>("transpose")
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // data
                                  .Arg<Indices>()          // ptr
                                  .Arg<Indices>()          // order
                                  .Arg<Indices>()          // inner
                                  .Ret<ffi::AnyBuffer>(),  // y
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseSddmmCuda, Sddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // dy
                                  .Arg<Indices>()          // rows
                                  .Arg<Indices>()          // cols
                                  .Ret<ffi::AnyBuffer>(),  // data
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_blocksparse
