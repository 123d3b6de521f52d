// The blocks of x^T dy on Hopper's tensor cores: what the kernels offer to the handlers. Plain C++.
//
// Everything that depends on the pattern comes as plan arrays (src/jax_blocksparse/sddmm_plan.py makes and describes
// them). The kernels compute units: squares of features that are a block or hold several. A tile is some units and the
// slabs of x and dy that they need. Units of 64 and 128 have a slab of x each, in the same order, and share a slab of
// dy; of units of 64 there may be two, the first for the first units and the second for the others. No content of the
// plan arrays can lead outside a buffer, or make CTAs wait for each other in vain.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../kernels.h"

namespace jax_blocksparse::sm90 {

// The most units that a tile can have, and the most slabs that it can need. As in sddmm_layout.py.
constexpr int SddmmCapacity(int unit) { return unit == 16 ? 160 : unit == 32 ? 48 : unit == 64 ? 12 : 3; }
constexpr int SddmmMaxSlabs(int unit) { return unit == 128 ? 4 : unit == 64 ? 14 : 28; }

// The most CTAs that can share a tile's tokens, as a cluster.
constexpr int kMaxSddmmSplit = 5;

// A batch size of 1 shares an operand between all batch elements.
struct SddmmParams {
  const void* x;               // (x_batch, tokens, in_features)
  const void* dy;              // (dy_batch, tokens, out_features)
  const std::int32_t* tiles;   // (plan_tiles + 1, 4), for each plan as the following
  const std::int32_t* slabs;   // (plan_tiles, SddmmMaxSlabs(unit))
  const std::int32_t* slots;   // (plan_units)
  const std::int32_t* order;   // (nnz)
  const std::int32_t* places;  // (nnz)
  void* data;                  // (batch, nnz, block, block)
  std::int64_t batch, x_batch, dy_batch;
  std::int64_t plan_batch_stride;  // in integers, a multiple of 4; 0 shares the plan
  std::int64_t tokens;
  std::int32_t in_features;
  std::int32_t out_features;
  std::int32_t nnz;
  std::int32_t block;
  std::int32_t unit;        // 16 to 128, a multiple of the block
  std::int32_t plan_tiles;  // tiles that the plan has room for
  std::int32_t plan_units;  // units that it has room for
  std::int32_t split;       // CTAs that share a tile's tokens: 1 to kMaxSddmmSplit
  ElementType type;         // of x and dy: kBF16, kF16, or kF32, which is multiplied as TF32
  bool f32_output;          // data is float, else it has the element type
};

// Whether the kernels take these operands: tensor copies want rows at multiples of 16 bytes.
inline bool CanLaunchSddmm(const SddmmParams& p) {
  const auto is_aligned = [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; };
  return is_aligned(p.x) && is_aligned(p.dy) && is_aligned(p.tiles) && is_aligned(p.data) && p.in_features % 8 == 0 &&
         p.out_features % 8 == 0;
}

cudaError_t LaunchSddmmBF16(const SddmmParams& params, cudaStream_t stream);
cudaError_t LaunchSddmmF16(const SddmmParams& params, cudaStream_t stream);
cudaError_t LaunchSddmmTF32(const SddmmParams& params, cudaStream_t stream);

}  // namespace jax_blocksparse::sm90
