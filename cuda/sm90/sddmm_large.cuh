// The blocks of x^T dy on Hopper by warpgroup products, for units of 64 and 128.
//
// A CTA has a tile of units, 12 of 64 or 3 of 128, and keeps their sums in registers for all tokens. Four warps copy,
// for each chunk of tokens, the slabs of x and dy that the tile's units need into a ring of stages; each of two
// warpgroups multiplies half of the units (of 64), or one half of each unit (of 128), straight from shared memory:
// both operands are stored token by token, "MN-major", and a slab serves every unit of its row or column. All CTAs
// pass through the tokens at about the same pace, so that memory is read once for a wave of CTAs. With few tiles, a
// cluster of two or four shares one: each CTA takes its part of the chunks, and the sums are added at the end, in a
// fixed order, out of each other's shared memory. Units of 128 also serve smaller blocks where most of a unit's blocks
// are present: all is computed, and what exists is stored. What bounds it: filling shared memory from L2; the tensor
// cores for full units of 128; reading x and dy from memory at low density.
#pragma once

#include "sddmm_common.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kUnit>
struct LargeConsumers {
  using Shape = SddmmShape<kUnit, kUnit == 128 ? 64 : 32>;
  static constexpr int kMostUnits = kUnit == 64 ? Shape::kCapacity / 2 : Shape::kCapacity;  // of a warpgroup
  static constexpr int kSums = kUnit / 2;                                                   // of a thread, for a unit
  static_assert(kUnit == 64 || kUnit == 128);
  static_assert(kProductWarps == 8, "two warpgroups");
  static_assert(kMostUnits * kSums <= 192, "the registers that are left for the rest");

  static __device__ __forceinline__ void Multiply(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                  SddmmRing ring, std::uint32_t stages, int warp) {
    const int half = warp / 4;
    const int first = kUnit == 64 ? half * ((tile.units + 1) / 2) : 0;
    const int count = kUnit == 128 ? tile.units : half == 0 ? (tile.units + 1) / 2 : tile.units / 2;
    MultiplyUpTo<kMostUnits>(p, tile, ring, stages, warp, first, count);
  }

 private:
  // The number of units must be known to the compiler, so that no product depends on a condition.
  template <int kCount>
  static __device__ __forceinline__ void MultiplyUpTo(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                      SddmmRing ring, std::uint32_t stages, int warp, int first,
                                                      int count) {
    if constexpr (kCount > 0) {
      if (count < kCount) {
        MultiplyUpTo<kCount - 1>(p, tile, ring, stages, warp, first, count);
      } else {
        MultiplyUnits<kCount>(p, tile, ring, stages, warp, first);
      }
    } else {  // the only unit is the other warpgroup's
      for (int chunk = tile.Chunks(p); chunk > 0; --chunk) {
        ring.WaitFull();
        __syncwarp();
        if (threadIdx.x % 32 == 0) Arrive(ring.empty());
        ring.Advance();
      }
      SyncThreads(1, kProductWarps * 32);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void MultiplyUnits(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                       SddmmRing ring, std::uint32_t stages, int warp, int first) {
    const int lane = threadIdx.x % 32, half = warp / 4;
    std::uint64_t x[kCount], dy[kCount];
    float sums[kCount][kSums];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int2 slot = tile.Slot(p, first + i);
      slot = {__shfl_sync(kAllLanes, slot.x, 0), __shfl_sync(kAllLanes, slot.y, 0)};
      const int panel = kUnit == 128 ? half * Shape::kPanelBytes : 0;  // this warpgroup's 64 features of x
      x[i] = MNMajorDescriptor(stages + slot.x * Shape::kSlabBytes + panel, 0);
      dy[i] = MNMajorDescriptor(stages + slot.y * Shape::kSlabBytes, Shape::kPanelBytes);
#pragma unroll
      for (float& sum : sums[i]) sum = 0.f;
    }

    const std::uint32_t stage_step = tile.stage_bytes() >> 4;
    std::uint32_t held = 0;  // the barrier of the stage that products under way still read, if any
    for (int chunk = tile.Chunks(p); chunk > 0; --chunk) {
      if (held != 0 && !ring.IsFull()) {  // a stage is not held while waiting for copies
        WaitForProducts<0>();
        KeepRegisters(sums);
        if (lane == 0) Arrive(held);
        held = 0;
      }
      ring.WaitFull();
      const std::uint32_t stage = ring.stage() * stage_step;
      KeepRegisters(sums);
      FenceProducts();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < Shape::kTokens / 16; ++k) {
          MultiplyMNMajor<T>(sums[i], x[i] + stage + k * kDepthStepMNMajor, dy[i] + stage + k * kDepthStepMNMajor);
        }
      }
      CommitProducts();
      if (held != 0) {
        WaitForProducts<1>();
        if (lane == 0) Arrive(held);
      }
      KeepRegisters(sums);
      held = ring.empty();
      ring.Advance();
    }
    WaitForProducts<0>();
    KeepRegisters(sums);

    SyncThreads(1, kProductWarps * 32);  // nobody reads the stages any more
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::uint32_t unit = stages + (first + i) * (kUnit * kUnit * 4);
      const int row = (kUnit == 128 ? half * 64 : 0) + warp % 4 * 16 + lane / 4;
#pragma unroll
      for (int n = 0; n < kSums / 4; ++n) {
        const int col = n * 8 + lane % 4 * 2;
        const float* sum = sums[i] + n * 4;
        StoreShared8(unit + SumOffset<kUnit>(row, col), sum[0], sum[1]);
        StoreShared8(unit + SumOffset<kUnit>(row + 8, col), sum[2], sum[3]);
      }
    }
  }
};

template <typename T, int kUnit>
__global__ void __launch_bounds__(kSddmmThreads, 1) SddmmLargeKernel(const __grid_constant__ SddmmKernelParams p) {
  RunSddmm<T, LargeConsumers<T, kUnit>>(p);
}

}  // namespace jax_blocksparse::sm90
