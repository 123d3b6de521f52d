#include "matmul.cuh"

namespace jax_blocksparse::sm90 {

cudaError_t LaunchMatmulF16(const MatmulParams& params, cudaStream_t stream) {
  return LaunchMatmulOf<__half>(params, stream);
}

}  // namespace jax_blocksparse::sm90
