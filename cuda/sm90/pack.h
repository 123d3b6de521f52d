// Puts small blocks where the matmul kernel finds them: in the order of its plan, ready for its registers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_blocksparse::sm90 {

// A batch size of 1 shares an operand between all batch elements.
struct PackParams {
  const void* data;           // (data_batch, nnz, block, block), of 16-bit elements
  const std::int32_t* order;  // (plan_batch, nnz): ids in the plan's order; an id out of range gives a block of zeros
  const std::int32_t* inner;  // (plan_batch, nnz): by id, the block of in_features it is multiplied with
  void* packed;               // (batch, nnz, block, block)
  std::int64_t batch, data_batch, plan_batch;
  std::int32_t in_features;  // entries beyond it become zero
  std::int32_t nnz;
  std::int32_t block;  // 8, 16 or 32
  bool transpose;      // multiply with the blocks' transposes
};

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream);

}  // namespace jax_blocksparse::sm90
