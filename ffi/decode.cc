#include "decode.h"

#include <cstddef>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

namespace jax_blocksparse {
namespace {

namespace ffi = xla::ffi;

template <typename Dimensions>
std::string ShapeString(const Dimensions& dims) {
  std::string text = "(";
  const char* separator = "";
  for (const std::int64_t dim : dims) {
    text += separator + std::to_string(dim);
    separator = ", ";
  }
  return text + ")";
}

// Remembers the first thing that is wrong. A check may rely on those before it: once one has failed, the rest are idle.
class Checks {
 public:
  explicit Checks(const char* target) : target_(target) {}

  bool failed() const { return !message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(std::string(target_) + ": " + message_); }

  void Require(bool condition, const std::string& message) {
    if (!failed() && !condition) message_ = message;
  }

  void Rank(const char* name, const ffi::AnyBuffer& buffer, std::size_t rank) {
    Require(buffer.dimensions().size() == rank, std::string(name) + " has shape " + ShapeString(buffer.dimensions()) +
                                                    ", wanted rank " + std::to_string(rank));
  }

  // The shape must be (1, sizes...), which is shared by the whole batch, or (batch, sizes...).
  template <typename Buffer>
  void Shape(const char* name, const Buffer& buffer, std::int64_t batch, std::initializer_list<std::int64_t> sizes) {
    if (failed()) return;
    const auto dims = buffer.dimensions();
    bool fits = dims.size() == sizes.size() + 1 && (dims[0] == 1 || dims[0] == batch);
    std::size_t i = 1;
    std::string wanted;
    for (const std::int64_t size : sizes) {
      fits = fits && dims[i++] == size;
      wanted += ", " + std::to_string(size);
    }
    Require(fits, std::string(name) + " has shape " + ShapeString(dims) + ", wanted (" + std::to_string(batch) +
                      wanted + ") or 1 in front");
  }

  void SameType(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType wanted) {
    std::ostringstream message;
    message << name << " has element type " << buffer.element_type() << ", wanted " << wanted;
    Require(buffer.element_type() == wanted, message.str());
  }

  void BlockSize(std::int64_t rows, std::int64_t columns) {
    bool known = false;
    for (const std::int64_t size : {8, 16, 32, 64, 128}) known = known || (rows == size && columns == size);
    Require(known, "data has blocks of " + std::to_string(rows) + " x " + std::to_string(columns) +
                       ", wanted squares of 8, 16, 32, 64 or 128");
  }

  // Kernels count features and blocks in 32 bits, and a little past the end.
  std::int32_t Size32(const char* name, std::int64_t size) {
    Require(size <= std::numeric_limits<std::int32_t>::max() - 1024,
            std::string(name) + " is " + std::to_string(size) + ", which is too large");
    return static_cast<std::int32_t>(size);
  }

  // The type of the operands, which the result must have too unless it is f32 and they are of 16 bits.
  ElementType Types(ffi::DataType operand, const char* result_name, ffi::DataType result) {
    ElementType type = ElementType::kF32;
    switch (operand) {
      case ffi::DataType::F32:
        break;
      case ffi::DataType::F64:
        type = ElementType::kF64;
        break;
      case ffi::DataType::BF16:
        type = ElementType::kBF16;
        break;
      case ffi::DataType::F16:
        type = ElementType::kF16;
        break;
      default:
        Require(false, "x has an element type other than f32, f64, bf16 and f16");
    }
    Require(result == operand || (Is16Bit(type) && result == ffi::DataType::F32),
            std::string(result_name) + " must have the element type of x, or be f32 where that is a 16-bit type");
    return type;
  }

 private:
  const char* target_;
  std::string message_;
};

// The distance between batch elements: 0 where a single one serves all.
template <typename Buffer>
std::int64_t BatchStride(const Buffer& buffer) {
  std::int64_t stride = 1;
  for (std::size_t i = 1; i < buffer.dimensions().size(); ++i) stride *= buffer.dimensions()[i];
  return buffer.dimensions()[0] == 1 ? 0 : stride;
}

}  // namespace

ffi::ErrorOr<MatmulParams> DecodeMatmul(const ffi::AnyBuffer& x, const ffi::AnyBuffer& data, const Indices& ptr,
                                        const Indices& order, const Indices& inner, ffi::AnyBuffer& y, bool transpose) {
  Checks checks("jax_blocksparse.matmul");
  checks.Rank("x", x, 3);
  checks.Rank("data", data, 4);
  checks.Rank("y", y, 3);
  if (checks.failed()) return ffi::Unexpected(checks.error());

  const auto x_dims = x.dimensions(), data_dims = data.dimensions(), y_dims = y.dimensions();
  const std::int64_t batch = y_dims[0], tokens = y_dims[1], nnz = data_dims[1], block = data_dims[2];
  checks.BlockSize(block, data_dims[3]);
  if (checks.failed()) return ffi::Unexpected(checks.error());
  checks.Shape("x", x, batch, {tokens, x_dims[2]});
  checks.Shape("data", data, batch, {nnz, block, block});
  checks.Shape("ptr", ptr, batch, {CeilDiv(y_dims[2], block) + 1});
  checks.Shape("order", order, batch, {nnz});
  checks.Shape("inner", inner, batch, {nnz});
  checks.Require(ptr.dimensions()[0] == order.dimensions()[0] && ptr.dimensions()[0] == inner.dimensions()[0],
                 "ptr, order and inner must have the same batch size");
  checks.SameType("data", data, x.element_type());

  MatmulParams params;
  params.x = x.untyped_data();
  params.data = data.untyped_data();
  params.ptr = ptr.typed_data();
  params.order = order.typed_data();
  params.inner = inner.typed_data();
  params.y = y.untyped_data();
  params.batch = batch;
  params.tokens = tokens;
  params.in_features = checks.Size32("the number of x's features", x_dims[2]);
  params.out_features = checks.Size32("the number of y's features", y_dims[2]);
  params.nnz = checks.Size32("the number of blocks", nnz);
  params.block = static_cast<std::int32_t>(block);
  params.x_batch_stride = BatchStride(x);
  params.data_batch_stride = BatchStride(data);
  params.ptr_batch_stride = BatchStride(ptr);
  params.order_batch_stride = BatchStride(order);
  params.type = checks.Types(x.element_type(), "y", y.element_type());
  params.transpose = transpose;
  params.f32_output = y.element_type() == ffi::DataType::F32;
  if (checks.failed()) return ffi::Unexpected(checks.error());
  return params;
}

ffi::ErrorOr<SddmmParams> DecodeSddmm(const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy, const Indices& rows,
                                      const Indices& cols, ffi::AnyBuffer& data) {
  Checks checks("jax_blocksparse.sddmm");
  checks.Rank("x", x, 3);
  checks.Rank("dy", dy, 3);
  checks.Rank("data", data, 4);
  if (checks.failed()) return ffi::Unexpected(checks.error());

  const auto x_dims = x.dimensions(), dy_dims = dy.dimensions(), data_dims = data.dimensions();
  const std::int64_t batch = data_dims[0], tokens = x_dims[1], nnz = data_dims[1];
  checks.BlockSize(data_dims[2], data_dims[3]);
  checks.Shape("x", x, batch, {tokens, x_dims[2]});
  checks.Shape("dy", dy, batch, {tokens, dy_dims[2]});
  checks.Shape("rows", rows, batch, {nnz});
  checks.Shape("cols", cols, batch, {nnz});
  checks.Require(rows.dimensions()[0] == cols.dimensions()[0], "rows and cols must have the same batch size");
  checks.SameType("dy", dy, x.element_type());

  SddmmParams params;
  params.x = x.untyped_data();
  params.dy = dy.untyped_data();
  params.rows = rows.typed_data();
  params.cols = cols.typed_data();
  params.data = data.untyped_data();
  params.batch = batch;
  params.tokens = tokens;
  params.in_features = checks.Size32("the number of x's features", x_dims[2]);
  params.out_features = checks.Size32("the number of dy's features", dy_dims[2]);
  params.nnz = checks.Size32("the number of blocks", nnz);
  params.block = static_cast<std::int32_t>(data_dims[2]);
  params.x_batch_stride = BatchStride(x);
  params.dy_batch_stride = BatchStride(dy);
  params.ids_batch_stride = BatchStride(rows);
  params.type = checks.Types(x.element_type(), "data", data.element_type());
  params.f32_output = data.element_type() == ffi::DataType::F32;
  if (checks.failed()) return ffi::Unexpected(checks.error());
  return params;
}

}  // namespace jax_blocksparse
