#include "sddmm.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchSddmmTF32(const SddmmParams& params, cudaStream_t stream) {
  return LaunchSddmmOf<float>(params, stream);
}

}  // namespace jax_blocksparse::sm90
