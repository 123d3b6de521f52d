#include "matmul.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchMatmulTF32(const MatmulParams& params, cudaStream_t stream) {
  return LaunchMatmulOf<float>(params, stream);
}

}  // namespace jax_blocksparse::sm90
