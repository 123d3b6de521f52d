// Checks of the buffers that XLA hands to a custom call. A message names the operand, what it has and what it should.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_blocksparse {

// A name with a shape, as in "x (1, 8, 64)".
template <typename Dimensions>
std::string Describe(const char* name, const Dimensions& dims) {
  std::string text = std::string(name) + " (";
  const char* separator = "";
  for (const std::int64_t dim : dims) {
    text += separator + std::to_string(dim);
    separator = ", ";
  }
  return text + ")";
}

// Remembers the first thing that is wrong; later checks are skipped then, so that they may rely on earlier ones.
class Validator {
 public:
  explicit Validator(const char* target) : target_(target) {}

  bool ok() const { return message_.empty(); }
  xla::ffi::Error error() const { return xla::ffi::Error::InvalidArgument(std::string(target_) + ": " + message_); }

  bool Require(bool condition, const std::string& message) {
    if (ok() && !condition) message_ = message;
    return ok();
  }

  template <typename Dimensions>
  bool Rank(const char* name, const Dimensions& dims, std::size_t rank) {
    return Require(dims.size() == rank, Describe(name, dims) + " must have rank " + std::to_string(rank));
  }

  // A wanted size of kAny is not checked; a wanted batch size of `batch` may also be 1.
  static constexpr std::int64_t kAny = -1;
  template <typename Dimensions>
  bool Shape(const char* name, const Dimensions& dims, std::int64_t batch, std::initializer_list<std::int64_t> wanted) {
    if (!Rank(name, dims, wanted.size() + 1)) return false;
    bool equal = dims[0] == 1 || dims[0] == batch;
    std::size_t i = 0;
    for (const std::int64_t size : wanted) {
      ++i;
      equal = equal && (size == kAny || size == static_cast<std::int64_t>(dims[i]));
    }
    if (ok() && !equal) {
      std::vector<std::int64_t> expected{batch};
      expected.insert(expected.end(), wanted.begin(), wanted.end());
      Require(false, Describe(name, dims) + " does not fit: expected " + Describe("sizes", expected) +
                         " (-1: any; the first may be 1)");
    }
    return ok();
  }

  // Feature sizes and numbers of blocks are 32-bit inside the kernels, which also count past the end a little.
  bool FitsInt32(const char* name, std::int64_t size) {
    return Require(size <= std::numeric_limits<std::int32_t>::max() - 1024,
                   std::string(name) + " " + std::to_string(size) + " is too large");
  }

 private:
  const char* target_;
  std::string message_;
};

}  // namespace jax_blocksparse
