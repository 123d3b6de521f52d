// Puts blocks where the matmul kernels find them: small ones in the order of the plan, ready for registers. Plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_blocksparse::sm90 {

// A batch stride of 0 shares an operand between all batch elements; strides count elements.
struct PackParams {
  const void* data;           // (Gd, nnz, block, block)
  const std::int32_t* order;  // (Gp, nnz): ids in the plan's order; an id out of range gives a block of zeros
  const std::int32_t* inner;  // (Gp, nnz): by id, the block of in_features it is multiplied with
  void* packed;               // (batch, nnz, block, block)
  std::int64_t batch;
  std::int64_t data_batch_stride;
  std::int64_t order_batch_stride;
  std::int64_t inner_batch_stride;
  std::int32_t in_features;  // entries beyond it become zero
  std::int32_t nnz;
  std::int32_t block;
  bool transpose;  // multiply with the blocks' transposes
};

// 16-bit elements, blocks of 8, 16 and 32.
cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream);
// Float, to be multiplied as TF32. Blocks of 64 and 128 keep their ids for positions (`order` is not looked at) and are
// transposed; those whose transposes are multiplied need no packing.
cudaError_t LaunchPackTF32(const PackParams& params, cudaStream_t stream);

}  // namespace jax_blocksparse::sm90
