// The plan of a sampled product as it comes from Python: one array of 32-bit integers, in which the lists that
// src/jax_blocksparse/sddmm_plan.py describes follow each other. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"
#include "sm90/sddmm.h"

namespace jax_blocksparse {

// Where the lists begin, in integers; every list is padded to a multiple of 16 bytes.
struct SddmmPlanLayout {
  std::int64_t tiles = 0;   // (plan_tiles + 1, 4)
  std::int64_t slabs = 0;   // (plan_tiles, SddmmMaxSlabs(unit))
  std::int64_t slots = 0;   // (plan_units)
  std::int64_t order = 0;   // (nnz)
  std::int64_t places = 0;  // (nnz)
  std::int64_t size = 0;    // of it all
  std::int64_t plan_tiles = 0;
  std::int64_t plan_units = 0;
};

// The layout of a plan with units of `unit` features and room for `tiles` tiles. Mirrors SddmmLayout of
// sddmm_layout.py.
constexpr SddmmPlanLayout SddmmPlanLayoutOf(const SddmmParams& p, int unit, std::int64_t tiles) {
  const auto padded = [](std::int64_t size) { return CeilDiv(size, 4) * 4; };
  SddmmPlanLayout layout;
  layout.plan_tiles = tiles;
  layout.plan_units = std::min<std::int64_t>(p.nnz, CeilDiv(p.in_features, unit) * CeilDiv(p.out_features, unit));
  layout.slabs = padded((tiles + 1) * 4);
  layout.slots = layout.slabs + padded(tiles * sm90::SddmmMaxSlabs(unit));
  layout.order = layout.slots + padded(layout.plan_units);
  layout.places = layout.order + padded(p.nnz);
  layout.size = layout.places + padded(p.nnz);
  return layout;
}

}  // namespace jax_blocksparse
