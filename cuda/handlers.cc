// The XLA custom calls: decode and check the operands, choose a kernel, launch it.
#include "handlers.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "kernels.h"
#include "validation.h"

namespace jax_blocksparse {
namespace {

namespace ffi = ::xla::ffi;
using Stream = ffi::PlatformStream<cudaStream_t>;
using Indices = ffi::Buffer<ffi::S32, 2>;
constexpr std::int64_t kAny = Validator::kAny;

bool IsBlockSize(std::int64_t size) { return size == 8 || size == 16 || size == 32 || size == 64 || size == 128; }

bool IsAligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Checks that `a` and `b` have a type the kernels know and that `out` has the same or is float32; returns that type.
ElementType CheckTypes(Validator& check, ffi::DataType a, const char* a_name, ffi::DataType b, const char* b_name,
                       ffi::DataType out, const char* out_name) {
  const bool known = a == ffi::F32 || a == ffi::BF16 || a == ffi::F16;
  check.Require(known, std::string(a_name) + " must be float32, bfloat16 or float16");
  check.Require(a == b, std::string(a_name) + " and " + b_name + " must have the same element type");
  check.Require(out == a || out == ffi::F32,
                std::string(out_name) + " must be float32 or have the element type of " + a_name);
  return a == ffi::BF16 ? ElementType::kBF16 : a == ffi::F16 ? ElementType::kF16 : ElementType::kF32;
}

// The distance between batch elements, 0 where a single one serves all.
std::int64_t BatchStride(std::int64_t own_batch, std::int64_t stride) { return own_batch == 1 ? 0 : stride; }

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

ffi::Error LaunchError(const char* target, cudaError_t error, const std::string& operands) {
  const std::string message = std::string(target) + " on " + operands + ": " + cudaGetErrorString(error) +
                              " (a launch also reports what an earlier kernel did wrong)";
  return error == cudaErrorInvalidConfiguration ? ffi::Error::InvalidArgument(message) : ffi::Error::Internal(message);
}

ffi::Error Matmul(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer data, Indices ptr, Indices order, Indices inner,
                  ffi::Result<ffi::AnyBuffer> y, bool transpose) {
  constexpr char kTarget[] = "jax_blocksparse.matmul";
  const auto x_dims = x.dimensions(), data_dims = data.dimensions(), y_dims = y->dimensions();
  Validator check(kTarget);
  const ElementType type =
      CheckTypes(check, x.element_type(), "x", data.element_type(), "data", y->element_type(), "y");
  check.Rank("x", x_dims, 3);
  check.Rank("data", data_dims, 4);
  check.Rank("y", y_dims, 3);
  if (!check.ok()) return check.error();

  const std::int64_t batch = y_dims[0], tokens = y_dims[1], out_features = y_dims[2], in_features = x_dims[2];
  const std::int64_t nnz = data_dims[1], block = data_dims[2];
  check.Require(IsBlockSize(block), Describe("data", data_dims) + " must have blocks of 8, 16, 32, 64 or 128");
  check.Shape("x", x_dims, batch, {tokens, kAny});
  check.Shape("data", data_dims, batch, {kAny, kAny, block});
  check.FitsInt32("in_features", in_features);
  check.FitsInt32("out_features", out_features);
  check.FitsInt32("nnz", nnz);
  if (!check.ok()) return check.error();
  check.Shape("ptr", ptr.dimensions(), batch, {CeilDiv(out_features, block) + 1});
  check.Shape("order", order.dimensions(), batch, {nnz});
  check.Shape("inner", inner.dimensions(), batch, {nnz});
  check.Require(order.dimensions()[0] == inner.dimensions()[0] && order.dimensions()[0] == ptr.dimensions()[0],
                "ptr, order and inner must have the same batch size");
  check.Require(IsAligned(data.untyped_data()), "data must start at a multiple of 16 bytes");
  if (!check.ok()) return check.error();
  if (y->element_count() == 0) return ffi::Error::Success();

  MatmulParams params;
  params.x = x.untyped_data();
  params.data = data.untyped_data();
  params.ptr = ptr.typed_data();
  params.order = order.typed_data();
  params.inner = inner.typed_data();
  params.y = y->untyped_data();
  params.batch = batch;
  params.tokens = tokens;
  params.in_features = static_cast<std::int32_t>(in_features);
  params.out_features = static_cast<std::int32_t>(out_features);
  params.nnz = static_cast<std::int32_t>(nnz);
  params.block = static_cast<std::int32_t>(block);
  params.x_batch_stride = BatchStride(x_dims[0], tokens * in_features);
  params.data_batch_stride = BatchStride(data_dims[0], nnz * block * block);
  params.ptr_batch_stride = BatchStride(ptr.dimensions()[0], ptr.dimensions()[1]);
  params.order_batch_stride = BatchStride(order.dimensions()[0], nnz);
  params.type = type;
  params.transpose = transpose;
  params.f32_output = y->element_type() == ffi::F32;

  const cudaError_t error = ChooseAndLaunch(params, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return LaunchError(kTarget, error,
                     Describe("x", x_dims) + ", " + Describe("data", data_dims) + ", " + Describe("y", y_dims));
}

ffi::Error Sddmm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer dy, Indices rows, Indices cols,
                 ffi::Result<ffi::AnyBuffer> data) {
  constexpr char kTarget[] = "jax_blocksparse.sddmm";
  const auto x_dims = x.dimensions(), dy_dims = dy.dimensions(), data_dims = data->dimensions();
  Validator check(kTarget);
  const ElementType type =
      CheckTypes(check, x.element_type(), "x", dy.element_type(), "dy", data->element_type(), "data");
  check.Rank("x", x_dims, 3);
  check.Rank("dy", dy_dims, 3);
  check.Rank("data", data_dims, 4);
  if (!check.ok()) return check.error();

  const std::int64_t batch = data_dims[0], nnz = data_dims[1], block = data_dims[2];
  const std::int64_t tokens = x_dims[1], in_features = x_dims[2], out_features = dy_dims[2];
  check.Require(IsBlockSize(block), Describe("data", data_dims) + " must have blocks of 8, 16, 32, 64 or 128");
  check.Shape("data", data_dims, batch, {kAny, kAny, block});
  check.Shape("x", x_dims, batch, {kAny, kAny});
  check.Shape("dy", dy_dims, batch, {tokens, kAny});
  check.Shape("rows", rows.dimensions(), batch, {nnz});
  check.Shape("cols", cols.dimensions(), batch, {nnz});
  check.Require(rows.dimensions()[0] == cols.dimensions()[0], "rows and cols must have the same batch size");
  check.FitsInt32("in_features", in_features);
  check.FitsInt32("out_features", out_features);
  check.FitsInt32("nnz", nnz);
  check.Require(IsAligned(data->untyped_data()), "data must start at a multiple of 16 bytes");
  if (!check.ok()) return check.error();
  if (data->element_count() == 0) return ffi::Error::Success();

  SddmmParams params;
  params.x = x.untyped_data();
  params.dy = dy.untyped_data();
  params.rows = rows.typed_data();
  params.cols = cols.typed_data();
  params.data = data->untyped_data();
  params.batch = batch;
  params.tokens = tokens;
  params.in_features = static_cast<std::int32_t>(in_features);
  params.out_features = static_cast<std::int32_t>(out_features);
  params.nnz = static_cast<std::int32_t>(nnz);
  params.block = static_cast<std::int32_t>(block);
  params.x_batch_stride = BatchStride(x_dims[0], tokens * in_features);
  params.dy_batch_stride = BatchStride(dy_dims[0], tokens * out_features);
  params.ids_batch_stride = BatchStride(rows.dimensions()[0], nnz);
  params.type = type;
  params.f32_output = data->element_type() == ffi::F32;

  const cudaError_t error = ChooseAndLaunch(params, stream);
  if (error == cudaSuccess) return ffi::Error::Success();
  return LaunchError(kTarget, error,
                     Describe("x", x_dims) + ", " + Describe("dy", dy_dims) + ", " + Describe("data", data_dims));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseMatmulCuda, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Indices>()
                                  .Arg<Indices>()
                                  .Arg<Indices>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transpose"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxBlocksparseSddmmCuda, Sddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Indices>()
                                  .Arg<Indices>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_blocksparse
