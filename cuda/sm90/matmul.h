// y = x W on Hopper's tensor cores: what the kernels offer to the handlers. Plain C++.
//
// Everything that depends on the pattern comes as plan arrays (src/jax_blocksparse/plan.py makes and describes them).
// Output features are cut into groups of 64, input features into chunks of 64; a tile has two or four groups, any; a
// step is a chunk in which a tile has blocks, or halves of two. No content of the plan arrays can lead outside a
// buffer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../epilogue.h"
#include "../kernels.h"

namespace jax_blocksparse::sm90 {

constexpr int kChunk = 64;                   // input features a step
constexpr int kHalf = 32;                    // input features that a step of small blocks can have without others
constexpr int kGroup = 64;                   // output features of a warpgroup's product, "M" of the instruction
constexpr int kPanel = 32;                   // output features of which a group has two
constexpr int kMostFeatures = kPanel << 16;  // output features that 16 bits for a panel can name

// The features of a tile.
constexpr int TileFeatures(int block) { return block == 16 || block == 32 ? 256 : 128; }

// The features that are stored together: a panel, or a whole group, whose panels are neighbours then.
constexpr int StoredFeatures(int block) { return block == 16 ? kPanel : kGroup; }

// The number of features whose blocks share a word of the plan's masks.
constexpr int SliceFeatures(int block) { return block < 16 ? 16 : block; }

// A batch size of 1 shares an operand between all batch elements.
struct MatmulParams {
  const void* x;  // (x_batch, tokens, in_features)
  // (data_batch, nnz, block, block). Blocks of 8 to 32: what packing makes of them, which must be the launch right
  // before. Blocks of 64 and 128: as they are, in any order, but those of float transposed if `transpose` would not be
  // true; where they stick out of W they may hold anything.
  const void* data;
  // (feature_tiles, 8): the panels of up to four groups, 16 bits each, first step, number of steps; most work first
  const std::int32_t* tiles;
  const std::int32_t* steps;  // (max_steps, 4)
  const std::int32_t* masks;  // (slices, max_steps); blocks of 8 to 32 only
  void* y;                    // (batch, tokens, out_features)
  std::int64_t batch, x_batch, data_batch;
  std::int64_t plan_batch_stride;  // of tiles, steps and masks, in integers; a multiple of 4, 0 if one plan serves all
  std::int64_t tokens;
  std::int32_t in_features;
  std::int32_t out_features;
  std::int32_t nnz;
  std::int32_t block;
  std::int32_t tile_features;  // TileFeatures(block)
  std::int32_t max_steps;      // of all tiles together
  std::int32_t capacity;       // blocks of 8 to 32: the most blocks a step has
  std::int32_t sms;            // of the device
  ElementType type;            // of x and data: kBF16, kF16, or kF32, which is multiplied as TF32
  bool transpose;              // blocks of 64 and 128: multiply with their transposes
  bool f32_output;             // y is float, else it has the element type
  Epilogue epilogue;           // none where y is float
};

// Whether the kernels take these operands: there is something to copy, tensor copies want rows at multiples of 16
// bytes, and the plan has 16 bits for a panel.
inline bool CanLaunchMatmul(const MatmulParams& p) {
  const auto is_aligned = [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; };
  return is_aligned(p.x) && is_aligned(p.data) && is_aligned(p.y) && is_aligned(p.tiles) && is_aligned(p.steps) &&
         is_aligned(p.epilogue.slope) && is_aligned(p.epilogue.scale) && p.nnz > 0 && p.in_features > 0 &&
         p.in_features % (Is16Bit(p.type) ? 8 : 4) == 0 && p.out_features % (p.f32_output ? 4 : 8) == 0 &&
         p.out_features <= kMostFeatures;
}

cudaError_t LaunchMatmulBF16(const MatmulParams& params, cudaStream_t stream);
cudaError_t LaunchMatmulF16(const MatmulParams& params, cudaStream_t stream);
cudaError_t LaunchMatmulTF32(const MatmulParams& params, cudaStream_t stream);

}  // namespace jax_blocksparse::sm90
