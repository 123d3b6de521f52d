#include "matmul_mma.cuh"

namespace jax_blocksparse {

cudaError_t LaunchMatmulMmaF16(const MatmulParams& params, TileSize size, cudaStream_t stream) {
  return LaunchMatmulMmaOf<__half>(params, size, stream);
}

}  // namespace jax_blocksparse
