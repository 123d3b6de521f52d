// What becomes of the sums of a product before they are written: y = act(sum + bias) * scale. Plain C++.
#pragma once

#include <cstdint>

namespace jax_blocksparse {

// The numbers are those of ACTIVATIONS in src/jax_blocksparse/activations.py.
enum class Activation : std::int32_t { kNone = 0, kRelu = 1, kGeluExact = 2, kGeluTanh = 3, kSilu = 4 };

constexpr int kSumTokens = 64;  // column sums are of so many tokens each

// Null pointers stand for what is left out. A batch stride of 0 shares the operand; strides count elements.
struct Epilogue {
  const float* bias = nullptr;   // (Gb, out_features)
  const void* scale = nullptr;   // (Gs, tokens, out_features), of the type of y
  void* slope = nullptr;         // (batch, tokens, out_features), of the type of y: takes act'(sum + bias)
  float* column_sums = nullptr;  // (batch, CeilDiv(tokens, kSumTokens), out_features): takes sums of y, if no bias and
                                 // no activation makes something of tokens that do not exist
  std::int64_t bias_batch_stride = 0;
  std::int64_t scale_batch_stride = 0;
  Activation activation = Activation::kNone;

  constexpr bool IsIdentity() const {
    return bias == nullptr && scale == nullptr && column_sums == nullptr && activation == Activation::kNone;
  }
};

}  // namespace jax_blocksparse
