// From a product to the kernel that does it best. Plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include "epilogue.h"
#include "matmul_plan.h"
#include "problem.h"
#include "sddmm_plan.h"

namespace jax_blocksparse {

// What the custom call of a product brings along for the Hopper kernels. `plan` is null if there is none.
struct MatmulPlan {
  const std::int32_t* plan = nullptr;
  std::int64_t batch = 1;
  std::int32_t tile_features = 0;
  std::int32_t capacity = 0;
  MatmulPlanLayout layout;
  void* workspace = nullptr;  // room for packed x (few tokens), or for the blocks of all batch elements of data or
                              // plan; null if none was asked for
};

cudaError_t Run(const MatmulParams& params, const MatmulPlan& plan, const Epilogue& epilogue, cudaStream_t stream);
// The same for the blocks of x^T dy.
struct SddmmPlan {
  const std::int32_t* plan = nullptr;
  std::int64_t batch = 1;
  std::int32_t unit = 0;
  std::int32_t split = 1;
  SddmmPlanLayout layout;
};

cudaError_t Run(const SddmmParams& params, const SddmmPlan& plan, cudaStream_t stream);

}  // namespace jax_blocksparse
