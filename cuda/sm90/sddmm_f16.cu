#include "sddmm.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchSddmmF16(const SddmmParams& params, cudaStream_t stream) {
  return LaunchSddmmOf<__half>(params, stream);
}

}  // namespace jax_blocksparse::sm90
