#include "matmul_skinny.cuh"

namespace jax_blocksparse {

cudaError_t LaunchMatmulSkinnyBF16(const MatmulParams& params, const Epilogue& epilogue, void* packed_x,
                                   bool has_clusters, int sm_count, cudaStream_t stream) {
  return LaunchMatmulSkinnyOf<__nv_bfloat16>(params, epilogue, packed_x, has_clusters, sm_count, stream);
}

}  // namespace jax_blocksparse
