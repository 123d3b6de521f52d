#include "sddmm_mma.cuh"

namespace jax_blocksparse {

cudaError_t LaunchSddmmMmaBF16(const SddmmParams& params, TileSize size, cudaStream_t stream) {
  return LaunchSddmmMmaOf<__nv_bfloat16>(params, size, stream);
}

}  // namespace jax_blocksparse
