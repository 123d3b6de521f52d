// The two products as kernels see them, on every platform: pointers, sizes, strides. Plain C++.
#pragma once

#include <cstdint>

namespace jax_blocksparse {

constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

enum class ElementType { kF32, kF64, kBF16, kF16 };

constexpr bool Is16Bit(ElementType type) { return type == ElementType::kBF16 || type == ElementType::kF16; }

// y[g, :, o*b:+b] = sum over the list of output block o of x[g, :, s*b:+b] times the block (or its transpose); the
// contract of the custom call "jax_blocksparse.matmul.v1". Entries of a block beyond in_features read as zero.
// A batch stride of 0 shares the operand between all batch elements; strides count elements.
struct MatmulParams {
  const void* x;              // (Gx, tokens, in_features)
  const void* data;           // (Gd, nnz, block, block)
  const std::int32_t* ptr;    // (Gp, output blocks + 1)
  const std::int32_t* order;  // (Gp, nnz): ids in list order
  const std::int32_t* inner;  // (Gp, nnz): by id, the block of in_features it is multiplied with
  void* y;                    // (batch, tokens, out_features)
  std::int64_t batch;
  std::int64_t tokens;
  std::int32_t in_features;
  std::int32_t out_features;
  std::int32_t nnz;
  std::int32_t block;
  std::int64_t x_batch_stride;
  std::int64_t data_batch_stride;
  std::int64_t ptr_batch_stride;
  std::int64_t order_batch_stride;  // of order and inner
  ElementType type;                 // of x and data
  bool transpose;
  bool f32_output;    // y is float, else it has the element type
  bool tf32 = false;  // factors of type float may be rounded to TF32
};

// data[g, z] = x[g, :, rows[z]*b:+b]^T dy[g, :, cols[z]*b:+b]; the contract of "jax_blocksparse.sddmm.v1". Zeros where
// a row or a column is out of range, and beyond in_features and out_features.
struct SddmmParams {
  const void* x;             // (Gx, tokens, in_features)
  const void* dy;            // (Gy, tokens, out_features)
  const std::int32_t* rows;  // (Gp, nnz)
  const std::int32_t* cols;  // (Gp, nnz)
  void* data;                // (batch, nnz, block, block)
  std::int64_t batch;
  std::int64_t tokens;
  std::int32_t in_features;
  std::int32_t out_features;
  std::int32_t nnz;
  std::int32_t block;
  std::int64_t x_batch_stride;
  std::int64_t dy_batch_stride;
  std::int64_t ids_batch_stride;  // of rows and cols
  ElementType type;               // of x and dy
  bool f32_output;                // data is float, else it has the element type
  bool tf32 = false;              // factors of type float may be rounded to TF32
};

}  // namespace jax_blocksparse
