#include "sddmm_mma.cuh"

namespace jax_blocksparse {

cudaError_t LaunchSddmmMmaF16(const SddmmParams& params, TileSize size, cudaStream_t stream) {
  return LaunchSddmmMmaOf<__half>(params, size, stream);
}

}  // namespace jax_blocksparse
