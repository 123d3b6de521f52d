// What becomes of the sums of a product before they are written: y = act(sum + bias) * scale. Plain C++.
#pragma once

#include <cstdint>

namespace jax_blocksparse {

// The numbers are those of ACTIVATIONS in src/jax_blocksparse/activations.py.
enum class Activation : std::int32_t { kNone = 0, kRelu = 1, kGeluExact = 2, kGeluTanh = 3, kSilu = 4 };

// Null pointers stand for what is left out. A batch stride of 0 shares the operand; strides count elements.
struct Epilogue {
  const float* bias = nullptr;  // (Gb, out_features)
  const void* scale = nullptr;  // (Gs, tokens, out_features), of the type of y
  void* slope = nullptr;        // (batch, tokens, out_features), of the type of y: takes act'(sum + bias)
  std::int64_t bias_batch_stride = 0;
  std::int64_t scale_batch_stride = 0;
  Activation activation = Activation::kNone;

  constexpr bool IsIdentity() const { return bias == nullptr && scale == nullptr && activation == Activation::kNone; }
};

}  // namespace jax_blocksparse
