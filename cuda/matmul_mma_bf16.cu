#include "matmul_mma.cuh"

namespace jax_blocksparse {

cudaError_t LaunchMatmulMmaBF16(const MatmulParams& params, TileSize size, cudaStream_t stream) {
  return LaunchMatmulMmaOf<__nv_bfloat16>(params, size, stream);
}

}  // namespace jax_blocksparse
