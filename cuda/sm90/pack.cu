#include "../launch.cuh"
#include "pack.h"
#include "problem.h"

namespace jax_blocksparse::sm90 {
namespace {

__global__ void PackKernel(const PackParams p) {
  const std::int64_t i = blockIdx.x * 256ll + threadIdx.x, bb = p.block * p.block, total = p.batch * p.nnz * bb;
  if (i >= total) return;
  const std::int64_t batch = i / (p.nnz * bb);
  const int position = i / bb % p.nnz, row = i % bb / p.block, column = i % p.block;
  const int id = p.order[batch * p.order_batch_stride + position];
  std::uint16_t value = 0;
  if (id >= 0 && id < p.nnz) {
    const std::int64_t inner = p.inner[batch * p.inner_batch_stride + id];
    const int from = p.transpose ? column * p.block + row : row * p.block + column;
    if (inner * p.block + row < p.in_features) {
      value = static_cast<const std::uint16_t*>(p.data)[batch * p.data_batch_stride + id * bb + from];
    }
  }
  static_cast<std::uint16_t*>(p.packed)[i] = value;
}

}  // namespace

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream) {
  const std::int64_t elements = params.batch * params.nnz * params.block * params.block;
  if (elements == 0) return cudaSuccess;
  return Launch<PackKernel>(params, CeilDiv(elements, 256), 256, 0, stream);
}

}  // namespace jax_blocksparse::sm90
