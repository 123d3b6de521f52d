// The blocks of x^T dy on Hopper by warpgroup products, for units of 64 and 128.
//
// A CTA has a tile of units, 12 of 64 or 3 of 128, in one column of units, and keeps their sums in registers for all
// tokens. Where columns are uneven, a tile of units of 64 may have the end of one and the beginning of the next: one
// for each warpgroup. Four warps copy, for each chunk of tokens, the slabs of x and of dy into a ring of stages; two
// warpgroups multiply straight from shared memory, where both operands are stored token by token, "MN-major". They
// compute dy^T x: 64 features of dy meet up to 256 of x in one instruction, which reads dy once for four panels of x;
// shared memory could not feed narrower products and be filled at the same time. Two CTAs with the same slab of dy copy
// it once for both. All CTAs pass through the tokens at about the same pace, so that memory is read once for a wave of
// CTAs. With few tiles, a cluster of two to five shares one: each CTA takes its part of the chunks, and the sums are
// added at the end, in a fixed order, out of each other's shared memory. Units of 128 also serve smaller blocks where
// most of a unit's blocks are present, and units of 64 blocks of 32 where few are: all is computed, and what exists is
// stored. What bounds it: the tensor cores and filling shared memory from L2, about equally; reading x and dy from
// memory at low density.
#pragma once

#include "sddmm_common.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kUnit>
struct LargeConsumers {
  using Shape = SddmmShape<T, kUnit, kUnit == 128 ? 64 : 32>;
  static constexpr int kMostPanels = kUnit == 64 ? Shape::kCapacity / 2 : Shape::kCapacity * 2;  // of a warpgroup
  static constexpr int kSums = 32;                                                               // of a thread, for one
  static constexpr int kMostAtOnce = 4;                                                          // in a product
  static_assert(kUnit == 64 || kUnit == 128);
  static_assert(kProductWarps == 8, "two warpgroups");
  static_assert(kMostPanels * kSums <= 192, "the registers that are left for the rest");
  static_assert(kMostPanels <= 2 * kMostAtOnce);

  // Units of 128: each warpgroup has a panel of dy, and all of x.
  static __device__ __forceinline__ void Multiply(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                  SddmmRing ring, std::uint32_t stages, int warp) {
    SddmmHalf part = {0, tile.x_slabs * Shape::kPanelsPerSlab, warp / 4};
    if constexpr (kUnit == 64) part = tile.Half(p, warp / 4);
    part.count = min(part.count, kMostPanels);
    MultiplyUpTo<kMostPanels>(p, tile, ring, stages, warp, part);
  }

 private:
  // The number of panels must be known to the compiler, so that no product depends on a condition.
  template <int kCount>
  static __device__ __forceinline__ void MultiplyUpTo(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                      SddmmRing ring, std::uint32_t stages, int warp,
                                                      const SddmmHalf& part) {
    if constexpr (kCount > 0) {
      if (part.count < kCount) {
        MultiplyUpTo<kCount - Shape::kPanelsPerSlab>(p, tile, ring, stages, warp, part);
      } else {
        MultiplyPanels<kCount>(p, tile, ring, stages, warp, part);
      }
    } else {  // the only panel is the other warpgroup's
      for (int chunk = tile.Chunks(p); chunk > 0; --chunk) {
        ring.WaitFull();
        __syncwarp();
        HandBack(tile, ring.empty());
        ring.Advance();
      }
      SyncThreads(1, kProductWarps * 32);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void MultiplyPanels(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                        SddmmRing ring, std::uint32_t stages, int warp,
                                                        const SddmmHalf& part) {
    constexpr int kFirst = std::min(kCount, kMostAtOnce), kSecond = kCount - kFirst;
    const int lane = threadIdx.x % 32;
    const std::uint64_t x = MNMajorDescriptor(stages + part.first * Shape::kPanelBytes, Shape::kPanelBytes);
    const std::uint64_t dy =
        MNMajorDescriptor(stages + tile.x_room * Shape::kSlabBytes + part.dy * Shape::kPanelBytes, 0);
    float sums[kCount * kSums] = {};

    const std::uint32_t stage_step = tile.stage_bytes() >> 4;
    std::uint32_t held = 0;  // the barrier of the stage that products under way still read, if any
    for (int chunk = tile.Chunks(p); chunk > 0; --chunk) {
      if (held != 0 && !ring.IsFull()) {  // a stage is not held while waiting for copies
        WaitForProducts<0>();
        KeepRegisters(sums);
        HandBack(tile, held);
        held = 0;
      }
      ring.WaitFull();
      const std::uint32_t stage = ring.stage() * stage_step;
      KeepRegisters(sums);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < Shape::kTokens / 16; ++k) {
        const std::uint32_t step = stage + k * kDepthStepMNMajor;
        MultiplyMNMajor<T, kFirst * kSums>(sums, dy + step, x + step);
        if constexpr (kSecond > 0) {
          constexpr std::uint32_t kNext = kFirst * Shape::kPanelBytes >> 4;
          MultiplyMNMajor<T, kSecond * kSums>(sums + kFirst * kSums, dy + step, x + step + kNext);
        }
      }
      CommitProducts();
      if (held != 0) {
        WaitForProducts<1>();
        HandBack(tile, held);
      }
      KeepRegisters(sums);
      held = ring.empty();
      ring.Advance();
    }
    WaitForProducts<0>();
    KeepRegisters(sums);

    SyncThreads(1, kProductWarps * 32);  // nobody reads the stages any more
    // The sums are those of dy^T x: a thread has neighbours in a column of the unit.
    const int col = (kUnit == 128 ? part.dy * Shape::kPanel : 0) + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int panel = part.first + i;
      const std::uint32_t unit = stages + panel / Shape::kPanelsPerSlab * (kUnit * kUnit * 4);
#pragma unroll
      for (int n = 0; n < kSums / 4; ++n) {
        const int row = panel % Shape::kPanelsPerSlab * Shape::kPanel + n * 8 + lane % 4 * 2;
        const float* sum = sums + i * kSums + n * 4;
        StoreShared4(unit + SumOffset<kUnit>(row, col), sum[0]);
        StoreShared4(unit + SumOffset<kUnit>(row + 1, col), sum[1]);
        StoreShared4(unit + SumOffset<kUnit>(row, col + 8), sum[2]);
        StoreShared4(unit + SumOffset<kUnit>(row + 1, col + 8), sum[3]);
      }
    }
  }
};

template <typename T, int kUnit>
__global__ void __launch_bounds__(kSddmmThreads, 1) SddmmLargeKernel(const __grid_constant__ SddmmKernelParams p) {
  RunSddmm<T, LargeConsumers<T, kUnit>>(p);
}

}  // namespace jax_blocksparse::sm90
