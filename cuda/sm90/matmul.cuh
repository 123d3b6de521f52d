// Chooses the kernel and its tile for an element type; one source file for each type instantiates this.
#pragma once

#include "matmul_large.cuh"
#include "matmul_small.cuh"

namespace jax_blocksparse::sm90 {

// Whether tiles of this size would leave half of the SMs without one. Then tiles of 64 tokens serve better.
inline bool AreFew(const MatmulParams& params, int tile_tokens) {
  const std::int64_t tiles =
      params.batch * CeilDiv(params.tokens, tile_tokens) * CeilDiv(params.out_features, params.tile_features);
  return tiles * 2 <= params.sms;
}

// Tiles have 32768 sums either way. Wide ones copy x less often, which counts for blocks of 16 and 32; four warpgroups
// hide each other's latency. Blocks of 8 leave hardly a product out; over more tokens products are longer, and A, which
// is the most work to gather from blocks of 8, is gathered less often.
template <typename T, int kBlock>
cudaError_t LaunchSmallTile(const MatmulParams& params, cudaStream_t stream) {
  if (params.tile_features != TileFeatures(kBlock)) return cudaErrorInvalidValue;
  if constexpr (TileFeatures(kBlock) == 256) {
    return AreFew(params, 128) ? LaunchSmall<T, kBlock, 64, 256>(params, stream)
                               : LaunchSmall<T, kBlock, 128, 256>(params, stream);
  } else {
    return AreFew(params, 256) ? LaunchSmall<T, kBlock, 64, 128>(params, stream)
                               : LaunchSmall<T, kBlock, 256, 128>(params, stream);
  }
}

// Two teams on tiles of 128 tokens copy a third more than one on 256, but overlap writing y with products, and fall
// apart half as far where columns are uneven: they are better where there are few products for each element of x and y,
// and not so few where writing takes long. The scale would keep a team from handing over to the other.
inline bool WantsTeams(const MatmulParams& params) {
  const double products = static_cast<double>(params.nnz) * params.block * params.block;
  const Epilogue& epilogue = params.epilogue;
  const int most = epilogue.activation != Activation::kNone ? 400 : epilogue.bias != nullptr ? 190 : 144;
  return epilogue.scale == nullptr && products < most * (double{params.in_features} + params.out_features);
}

// Clusters save copies of W, which pays where products bound and there is much of it; they cost some waiting for each
// other and are placed so that fewer copies of x by neighbours coincide.
template <typename T, int kBlock, bool kTranspose>
cudaError_t LaunchLargeTile(const MatmulParams& params, cudaStream_t stream) {
  if (AreFew(params, 256)) return LaunchLarge<T, kBlock, kTranspose, 64, 1>(params, stream);
  if (WantsTeams(params)) return LaunchLarge<T, kBlock, kTranspose, 128, 1>(params, stream);
  if constexpr (kBlock == 128) {
    const double density = static_cast<double>(params.nnz) * kBlock * kBlock /
                           (static_cast<double>(params.in_features) * params.out_features);
    if (density > 0.15) return LaunchLarge<T, kBlock, kTranspose, 256, 2>(params, stream);
  }
  return LaunchLarge<T, kBlock, kTranspose, 256, 1>(params, stream);
}

template <typename T, int kBlock>
cudaError_t LaunchLargeBlock(const MatmulParams& params, cudaStream_t stream) {
  if (params.transpose) return LaunchLargeTile<T, kBlock, true>(params, stream);
  if constexpr (std::is_same_v<T, float>) {
    return cudaErrorInvalidValue;
  } else {
    return LaunchLargeTile<T, kBlock, false>(params, stream);
  }
}

template <typename T>
cudaError_t LaunchMatmulOf(const MatmulParams& params, cudaStream_t stream) {
  if (params.batch * params.tokens * params.out_features == 0) return cudaSuccess;
  switch (params.block) {
    case 8:
      return LaunchSmallTile<T, 8>(params, stream);
    case 16:
      return LaunchSmallTile<T, 16>(params, stream);
    case 32:
      return LaunchSmallTile<T, 32>(params, stream);
    case 64:
      return LaunchLargeBlock<T, 64>(params, stream);
    case 128:
      return LaunchLargeBlock<T, 128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
