// What the kernels offer to the handlers: one parameter struct and a few launch functions for each product.
// Plain C++, so that handlers.cc needs no CUDA compiler. The launchers check nothing: handlers.cc did.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_blocksparse {

constexpr std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

enum class ElementType { kF32, kBF16, kF16 };

// How large a piece of the result one CTA computes: large pieces reuse operands, small ones give every SM work.
enum class TileSize { kLarge, kSmall };

// y[g, :, o*b:+b] = sum over the list of output block o of x[g, :, s*b:+b] times the block (or its transpose).
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
  bool f32_output;  // y is float, else it has the element type
};

// data[g, z] = x[g, :, rows[z]*b:+b]^T dy[g, :, cols[z]*b:+b]
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
};

// The extent of a tensor-core kernel's tile, and with it the number of CTAs: the handlers choose the tile size by that.
constexpr int MatmulTileTokens(TileSize size) { return size == TileSize::kLarge ? 128 : 32; }
constexpr int MatmulTileFeatures(TileSize size, int block) {
  return size == TileSize::kLarge || block == 128 ? 128 : 64;
}
constexpr std::int64_t MatmulMmaCtas(const MatmulParams& p, TileSize size) {
  return p.batch * CeilDiv(p.tokens, MatmulTileTokens(size)) *
         CeilDiv(p.out_features, MatmulTileFeatures(size, p.block));
}
constexpr int SddmmTileIds(TileSize size, int block) { return size == TileSize::kLarge ? 128 / block : 1; }
constexpr int SddmmTilesPerId(TileSize size, int block) { return size == TileSize::kSmall && block == 128 ? 4 : 1; }
constexpr std::int64_t SddmmMmaCtas(const SddmmParams& p, TileSize size) {
  return p.batch * CeilDiv(p.nnz, SddmmTileIds(size, p.block)) * SddmmTilesPerId(size, p.block);
}

// Tensor cores: 16-bit elements, blocks of 16 to 128.
cudaError_t LaunchMatmulMmaBF16(const MatmulParams& params, TileSize size, cudaStream_t stream);
cudaError_t LaunchMatmulMmaF16(const MatmulParams& params, TileSize size, cudaStream_t stream);
cudaError_t LaunchSddmmMmaBF16(const SddmmParams& params, TileSize size, cudaStream_t stream);
cudaError_t LaunchSddmmMmaF16(const SddmmParams& params, TileSize size, cudaStream_t stream);

// Plain FMA: float32 in any block size, 16-bit elements in blocks of 8.
cudaError_t LaunchMatmulSimt(const MatmulParams& params, cudaStream_t stream);
cudaError_t LaunchSddmmSimt(const SddmmParams& params, cudaStream_t stream);

}  // namespace jax_blocksparse
