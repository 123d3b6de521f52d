// What the kernels offer to the handlers: one parameter struct and a few launch functions for each product.
// Plain C++, so that handlers.cc needs no CUDA compiler. The launchers check nothing: handlers.cc did.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epilogue.h"
#include "problem.h"

namespace jax_blocksparse {

// How large a piece of the result one CTA computes: large pieces reuse operands, small ones give every SM work.
enum class TileSize { kLarge, kSmall };

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

// Few tokens on tensor cores: 16-bit elements, all block sizes, x with rows that start at multiples of 16 bytes. They
// take any number of tokens, but read the weights again for each 64. Up to kFewTokens, x may be packed first: then
// `packed_x` is room for it, of PackedXElements for each batch element of x.
constexpr int kFewTokens = 64;
constexpr std::int64_t PackedXElements(const MatmulParams& p) {
  return CeilDiv(p.in_features, 32) * 32 * (p.tokens <= 16 ? 16 : p.tokens <= 32 ? 32 : 64);
}
inline bool CanLaunchMatmulSkinny(const MatmulParams& p) {
  constexpr std::int64_t kMaxGrid = 65528;  // in y and z, in whole clusters
  return Is16Bit(p.type) && p.in_features % 8 == 0 && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 &&
         CeilDiv(p.out_features, 8) <= kMaxGrid && p.batch <= kMaxGrid;
}
cudaError_t LaunchMatmulSkinnyBF16(const MatmulParams& params, const Epilogue& epilogue, void* packed_x,
                                   bool has_clusters, int sm_count, cudaStream_t stream);
cudaError_t LaunchMatmulSkinnyF16(const MatmulParams& params, const Epilogue& epilogue, void* packed_x,
                                  bool has_clusters, int sm_count, cudaStream_t stream);

// Matrices so small that a CTA has room for all blocks; no batches, no column sums.
bool CanLaunchMatmulTiny(const MatmulParams& params, const Epilogue& epilogue);
cudaError_t LaunchMatmulTiny(const MatmulParams& params, const Epilogue& epilogue, cudaStream_t stream);

// The same for the blocks of x^T dy, of so few tokens and features that a CTA has room for all of x and dy.
bool CanLaunchSddmmTiny(const SddmmParams& params);
cudaError_t LaunchSddmmTiny(const SddmmParams& params, cudaStream_t stream);

// Plain FMA: float32 in any block size, 16-bit elements in blocks of 8.
cudaError_t LaunchMatmulSimt(const MatmulParams& params, cudaStream_t stream);
cudaError_t LaunchSddmmSimt(const SddmmParams& params, cudaStream_t stream);

// Applies an epilogue to a product that has been written.
cudaError_t LaunchEpilogue(const MatmulParams& product, const Epilogue& epilogue, cudaStream_t stream);

}  // namespace jax_blocksparse
