#include "matmul.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchMatmulBF16(const MatmulParams& params, cudaStream_t stream) {
  return LaunchMatmulOf<__nv_bfloat16>(params, stream);
}

}  // namespace jax_blocksparse::sm90
