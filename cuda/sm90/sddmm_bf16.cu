#include "sddmm.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchSddmmBF16(const SddmmParams& params, cudaStream_t stream) {
  return LaunchSddmmOf<__nv_bfloat16>(params, stream);
}

}  // namespace jax_blocksparse::sm90
