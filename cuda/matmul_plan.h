// The plan of a product as it comes from Python: one array of 32-bit integers, in which the lists that
// src/jax_blocksparse/plan.py describes follow each other. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace jax_blocksparse {

constexpr int kPlanChunk = 64;  // input features of a step

// Whether the Hopper kernels want the blocks brought into place first: small ones, and float ones with rows along the
// depth, which they cannot read across.
constexpr bool NeedsPacking(const MatmulParams& p) {
  return p.block < kPlanChunk || (p.type == ElementType::kF32 && !p.transpose);
}

// Where the lists begin, in integers; every list is padded to a multiple of 16 bytes.
struct MatmulPlanLayout {
  std::int64_t tiles = 0;  // (feature_tiles, 8): panels, first step, number of steps, unused; most work first
  std::int64_t steps = 0;  // (max_steps, 4)
  std::int64_t masks = 0;  // (slices, max_steps)
  std::int64_t order = 0;  // (nnz): ids in the order in which the kernel takes the blocks
  std::int64_t size = 0;   // of it all
  std::int64_t feature_tiles = 0;
  std::int64_t max_steps = 0;
  std::int64_t slices = 0;
};

// The layout of the plan of a pattern of this many blocks. Mirrors PlanLayout of plan_layout.py.
constexpr MatmulPlanLayout PlanLayoutOf(const MatmulParams& p, std::int64_t tile_features, std::int64_t capacity) {
  const bool packs = p.block < kPlanChunk;
  const auto padded = [](std::int64_t size) { return CeilDiv(size, 4) * 4; };
  MatmulPlanLayout layout;
  layout.feature_tiles = CeilDiv(p.out_features, tile_features);
  const std::int64_t chunks_met = p.nnz * std::max<std::int64_t>(1, p.block / kPlanChunk);
  layout.max_steps =
      std::min(layout.feature_tiles * CeilDiv(p.in_features, kPlanChunk), chunks_met) + (packs ? p.nnz / capacity : 0);
  layout.slices = packs ? tile_features / std::max<std::int64_t>(16, p.block) : 0;
  layout.steps = layout.feature_tiles * 8;
  layout.masks = layout.steps + padded(layout.max_steps * 4);
  layout.order = layout.masks + padded(layout.slices * layout.max_steps);
  layout.size = layout.order + padded(packs ? p.nnz : 0);
  return layout;
}

}  // namespace jax_blocksparse
