// Checks of what XLA hands to a handler, with messages that name the operand and both shapes.
#ifndef JAX_BLOCKSPARSE_CPU_CHECKS_H_
#define JAX_BLOCKSPARSE_CPU_CHECKS_H_

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace jax_blocksparse {

template <typename Dimensions>
std::string shape_string(const Dimensions& dims) {
  std::ostringstream out;
  out << "(";
  const char* separator = "";
  for (const int64_t dim : dims) {
    out << separator << dim;
    separator = ", ";
  }
  out << ")";
  return out.str();
}

// Collects the first thing found wrong with a call; the checks after it do nothing.
class Checks {
 public:
  explicit Checks(const char* target) : target_(target) {}

  void rank(const char* name, const xla::ffi::AnyBuffer& buffer, std::size_t wanted) {
    if (buffer.dimensions().size() == wanted) return;
    fail(std::string(name) + " has shape " + shape_string(buffer.dimensions()) + ", wanted rank " +
         std::to_string(wanted));
  }

  // Call after rank() has passed for every buffer the wanted sizes come from.
  void shape(const char* name, const xla::ffi::AnyBuffer& buffer, std::initializer_list<int64_t> wanted) {
    const auto dims = buffer.dimensions();
    if (std::equal(dims.begin(), dims.end(), wanted.begin(), wanted.end())) return;
    fail(std::string(name) + " has shape " + shape_string(dims) + ", wanted " + shape_string(wanted));
  }

  void type(const char* name, const xla::ffi::AnyBuffer& buffer, xla::ffi::DataType wanted) {
    if (buffer.element_type() == wanted) return;
    std::ostringstream out;
    out << name << " has element type " << buffer.element_type() << ", wanted " << wanted;
    fail(out.str());
  }

  // A leading dimension of 1 is shared by the whole batch.
  void batch(const char* name, int64_t size, int64_t batch) {
    if (size == 1 || size == batch) return;
    fail(std::string(name) + " has a batch of " + std::to_string(size) + ", wanted 1 or " + std::to_string(batch));
  }

  void block_size(int64_t rows, int64_t columns) {
    for (const int64_t size : {8, 16, 32, 64, 128}) {
      if (rows == size && columns == size) return;
    }
    fail("data has blocks of " + std::to_string(rows) + " x " + std::to_string(columns) +
         ", wanted squares of 8, 16, 32, 64 or 128");
  }

  void fail(const std::string& message) {
    if (message_.empty()) message_ = message;
  }

  bool failed() const { return !message_.empty(); }
  xla::ffi::Error error() const { return xla::ffi::Error::InvalidArgument(std::string(target_) + ": " + message_); }

 private:
  const char* target_;
  std::string message_;
};

inline std::optional<DType> dtype_of(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::DataType::F32:
      return DType::kF32;
    case xla::ffi::DataType::F64:
      return DType::kF64;
    case xla::ffi::DataType::BF16:
      return DType::kBF16;
    case xla::ffi::DataType::F16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

}  // namespace jax_blocksparse

#endif  // JAX_BLOCKSPARSE_CPU_CHECKS_H_
