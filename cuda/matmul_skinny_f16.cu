#include "matmul_skinny.cuh"

namespace jax_blocksparse {

cudaError_t LaunchMatmulSkinnyF16(const MatmulParams& params, const Epilogue& epilogue, int sm_count,
                                  cudaStream_t stream) {
  return LaunchMatmulSkinnyOf<__half>(params, epilogue, sm_count, stream);
}

}  // namespace jax_blocksparse
