// The blocks of x^T dy on Hopper by mma.sync, for units of 16 and 32.
//
// As the kernel for large units (sddmm_large.cuh): tiles of units with their sums in registers for all tokens, slabs of
// x and dy streaming through a ring of stages, clusters that share a tile, copies of dy, or both. Units of 16 or 32
// features lie anywhere in the slabs, and ldmatrix fetches and transposes their operands. Each warp has a run of the
// tile's units in the order of rows: units of one row use the same fragments of x, which are loaded once; those of dy
// are loaded one unit ahead. What bounds it: reading fragments out of shared memory and mma.sync at high density,
// filling shared memory from L2 at low density.
#pragma once

#include "sddmm_common.cuh"

namespace jax_blocksparse::sm90 {

template <typename T, int kUnit>
struct SmallConsumers {
  using Shape = SddmmShape<T, kUnit, 32>;
  static constexpr int kSteps = kUnit / 16;           // products along a unit's side
  static constexpr int kDepthBytes = 16 * kRowBytes;  // of the tokens of a product
  static_assert(kUnit == 16 || kUnit == 32);
  static_assert(Shape::kUnitsOfWarp <= 32);
  static_assert(kRingBytes / 16 <= 1 << 16, "an address in a stage fits 16 bits, in pieces of 16 bytes");

  static __device__ __forceinline__ void Multiply(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                  SddmmRing ring, std::uint32_t stages, int warp) {
    WithUnitsAndDepths<Shape>(tile.units, [&](auto units, auto depths) {
      MultiplyUnits<decltype(units)::value, decltype(depths)::value>(p, tile, ring, stages, warp);
    });
  }

 private:
  // For up to kUnits units, kDepths products along the tokens at a time.
  template <int kUnits, int kDepths>
  static __device__ __forceinline__ void MultiplyUnits(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                       SddmmRing ring, std::uint32_t stages, int warp) {
    static_assert(Shape::kTokens / 16 % kDepths == 0);
    const int lane = threadIdx.x % 32;
    const int share = warp % 4 * 2 + warp / 4;  // neighbours are on the same quarter of the SM: quarters get equal work
    const int first = share * tile.units / kProductWarps, count = (share + 1) * tile.units / kProductWarps - first;

    // Where this lane's row of each unit's first 16 x 16 piece lies in a stage, in pieces of 16 bytes: x in the lower
    // half of a word, dy in the upper. Of x come first the matrices of tokens 0 to 7, of dy those of features 0 to 7:
    // the orders in which the product wants them.
    const auto address = [](int unit, int token, int piece) {
      constexpr int kPerPanel = Shape::kPanel / kUnit;
      const int eighth = unit % kPerPanel * (kUnit / 8) + piece;
      return unit / kPerPanel * (Shape::kPanelBytes / 16) + token * 8 + (eighth ^ token % 8);
    };
    std::uint32_t places[kUnits];
    // Bit i: unit i has another row of units than the one before. Found by a lane's own places: the compiler would keep
    // what it knows to be the same for all lanes in a uniform register, and stall on the way back to predicates.
    std::uint32_t starts = 0;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int2 slot = i < count ? tile.Slot(p, first + i) : int2{};
      places[i] = address(slot.x, lane % 8 + lane / 16 * 8, lane / 8 % 2) | address(slot.y, lane % 16, lane / 16) << 16;
      if (i == 0 || ((places[i] ^ places[i - 1]) & 0xffff) != 0) starts |= 1u << i;
    }
    starts = __shfl_sync(kAllLanes, starts, 0);

    float sums[kUnits][kSteps][2 * kSteps][4] = {};
    ForEachStage(p, tile, ring, stages, [&](std::uint32_t stage) {
#pragma unroll
      for (int k = 0; k < Shape::kTokens / 16; k += kDepths) {
        const std::uint32_t base = stage + k * kDepthBytes;
        std::uint32_t x[kDepths][kSteps][4], dy[2][kDepths][kSteps][4];
        const auto load = [&](std::uint32_t (&to)[kDepths][kSteps][4], std::uint32_t place) {
#pragma unroll
          for (int d = 0; d < kDepths; ++d) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              LoadMatrices<true>(to[d][step], base + d * kDepthBytes + (place << 4 ^ step * 32));
            }
          }
        };
        const auto load_x = [&](int i) { load(x, places[i] & 0xffff); };
        const auto load_dy = [&](int i) { load(dy[i % 2], places[i] >> 16); };
        // Else the compiler keeps all the conditions below, and runs out of predicates.
        asm volatile("" : "+r"(starts));
        load_x(0);
        load_dy(0);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          if (i >= count) break;
          if (i + 1 < kUnits) load_dy(i + 1);
#pragma unroll
          for (int d = 0; d < kDepths; ++d) {
#pragma unroll
            for (int m = 0; m < kSteps; ++m) {
#pragma unroll
              for (int n = 0; n < kSteps; ++n) {
                const std::uint32_t* columns = dy[i % 2][d][n];
                MultiplyAdd<T>(sums[i][m][2 * n], x[d][m], columns[0], columns[1]);
                MultiplyAdd<T>(sums[i][m][2 * n + 1], x[d][m], columns[2], columns[3]);
              }
            }
          }
          if (i + 1 < kUnits && (starts >> (i + 1) & 1)) load_x(i + 1);
        }
      }
    });

#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (i >= count) break;
      const std::uint32_t unit = stages + (first + i) * (kUnit * kUnit * 4);
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
          const int row = m * 16 + lane / 4, col = n * 8 + lane % 4 * 2;
          const float* sum = sums[i][m][n];
          StoreShared8(unit + SumOffset<kUnit>(row, col), sum[0], sum[1]);
          StoreShared8(unit + SumOffset<kUnit>(row + 8, col), sum[2], sum[3]);
        }
      }
    }
  }
};

template <typename T, int kUnit>
__global__ void __launch_bounds__(kSddmmThreads, 1) SddmmSmallKernel(const __grid_constant__ SddmmKernelParams p) {
  RunSddmm<T, SmallConsumers<T, kUnit>>(p);
}

}  // namespace jax_blocksparse::sm90
