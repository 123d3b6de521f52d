// The blocks of x^T dy on Hopper by mma.sync, for float factors rounded to TF32.
//
// As the other kernels (sddmm_large.cuh, sddmm_small.cuh): tiles of units with their sums in registers for all tokens,
// slabs of x and dy streaming through a ring of stages, clusters that share a tile. Warpgroup products and ldmatrix
// cannot transpose floats, and tokens, the depth of the product, are rows in memory; but the fragments of mma.sync are
// single floats, so lanes read them as they lie. Which feature and which token stands for which row and which depth of
// a product is free. A lane's tokens are chosen two apart, whose rows lie in different banks, and its features of x are
// neighbours, so that what one load brings is what neighbouring registers of the fragment want: moving registers about
// would cost more than the products. Tensor copies have rounded everything.
// Units of 16 and 32 lie anywhere in the slabs: each warp has a run of them in the order of rows; those of one row use
// the same fragments of x, and those of dy are loaded one unit ahead. Of larger units a warp has two panels of dy, 64
// features, and some panels of x, each fragment of which serves both.
// What bounds it: mma.sync and, about evenly for units up to 32, reading fragments out of shared memory.
#pragma once

#include "sddmm_common.cuh"

namespace jax_blocksparse::sm90 {

// The fragments of kFeatures features of x or dy and eight tokens, those of 16 with even numbers or the others.
template <int kFeatures>
struct XFragments {
  std::uint32_t rows[kFeatures / 16][4];
};
template <int kFeatures>
struct DyFragments {
  std::uint32_t columns[kFeatures / 8][2];
};

// Where in a panel a lane's part of the first 16 features of x, or the first 8 of dy, lies, for even tokens.
__device__ __forceinline__ std::uint32_t XPlace(int lane) {
  const int token = lane % 4 * 2;
  return token * 128 + (lane / 4 * 8 ^ token << 4);
}
__device__ __forceinline__ std::uint32_t DyPlace(int lane) {
  const int token = lane % 4 * 2;
  return token * 128 + (lane / 4 * 4 ^ token << 4);
}
constexpr std::uint32_t kEightTokens = 8 * 128;
// What turns it into the place for the tokens with odd numbers: a row of 128 bytes and the swizzle.
constexpr std::uint32_t kNextToken = 128 | 1 << 4;

// `place` is a multiple of 2 KB more than what the functions above give, but for bits flipped.
template <int kFeatures>
__device__ __forceinline__ void Load(XFragments<kFeatures>& to, std::uint32_t tokens, std::uint32_t place) {
#pragma unroll
  for (int m = 0; m < kFeatures / 16; ++m) {
    const std::uint32_t from = tokens + (place ^ m * 64);
    const uint2 first = LoadShared8(from), second = LoadShared8(from + kEightTokens);
    to.rows[m][0] = first.x;
    to.rows[m][1] = first.y;
    to.rows[m][2] = second.x;
    to.rows[m][3] = second.y;
  }
}
template <int kFeatures>
__device__ __forceinline__ void Load(DyFragments<kFeatures>& to, std::uint32_t tokens, std::uint32_t place) {
#pragma unroll
  for (int n = 0; n < kFeatures / 8; ++n) {
    const std::uint32_t from = tokens + (place ^ n * 32);
    to.columns[n][0] = LoadShared4(from);
    to.columns[n][1] = LoadShared4(from + kEightTokens);
  }
}

// The sums of a square of features.
template <int kFeatures>
struct PieceSums {
  float values[kFeatures / 16][kFeatures / 8][4] = {};

  __device__ __forceinline__ void Add(const XFragments<kFeatures>& x, const DyFragments<kFeatures>& dy) {
#pragma unroll
    for (int m = 0; m < kFeatures / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kFeatures / 8; ++n) {
        MultiplyAdd<float>(values[m][n], x.rows[m], dy.columns[n][0], dy.columns[n][1]);
      }
    }
  }

  // To where the square begins in a unit in shared memory.
  template <int kUnit>
  __device__ __forceinline__ void Store(std::uint32_t unit, int first_row, int first_col, int lane) const {
#pragma unroll
    for (int m = 0; m < kFeatures / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kFeatures / 8; ++n) {
        const int row = first_row + m * 16 + lane / 4 * 2, col = first_col + n * 8 + lane % 4 * 2;
        StoreShared8(unit + SumOffset<kUnit>(row, col), values[m][n][0], values[m][n][1]);
        StoreShared8(unit + SumOffset<kUnit>(row + 1, col), values[m][n][2], values[m][n][3]);
      }
    }
  }
};

template <int kUnit>
struct SmallTF32Consumers {
  using Shape = SddmmShape<float, kUnit, 16>;
  static_assert(kUnit == 16 || kUnit == 32);
  static_assert(Shape::kUnitsOfWarp <= 32);
  static_assert(Shape::kPanel % kUnit == 0, "a unit is in one panel");
  static_assert(kRingBytes / 4 <= 1 << 16, "an address in a stage fits 16 bits, in units of 4 bytes");

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
    static_assert(Shape::kTokens / 8 % kDepths == 0);
    const int lane = threadIdx.x % 32;
    const int first = warp * tile.units / kProductWarps, count = (warp + 1) * tile.units / kProductWarps - first;

    // Where this lane's part of each unit begins in a stage, in units of 4 bytes: x in the lower half of a word, dy in
    // the upper.
    const auto place = [](int unit, std::uint32_t of_lane) {
      constexpr int kPerPanel = Shape::kPanel / kUnit;
      return (unit / kPerPanel * Shape::kPanelBytes + (of_lane ^ unit % kPerPanel * (kUnit * 4))) / 4;
    };
    std::uint32_t places[kUnits];
    std::uint32_t starts = 0;  // bit i: unit i has other features of x than the one before
    int last = -1;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int2 slot = i < count ? tile.Slot(p, first + i) : int2{};
      places[i] = place(slot.x, XPlace(lane)) | place(slot.y, DyPlace(lane)) << 16;
      if (slot.x != last) starts |= 1u << i;
      last = slot.x;
    }
    starts = __shfl_sync(kAllLanes, starts, 0);

    PieceSums<kUnit> sums[kUnits];
    ForEachStage(p, tile, ring, stages, [&](std::uint32_t stage) {
#pragma unroll
      for (int k = 0; k < Shape::kTokens / 8; k += kDepths) {
        XFragments<kUnit> x[kDepths];
        DyFragments<kUnit> dy[2][kDepths];
        const auto load = [&](auto& to, std::uint32_t place) {
#pragma unroll
          for (int d = 0; d < kDepths; ++d) {
            Load(to[d], stage + (k + d) / 2 * (2 * kEightTokens), place << 2 ^ (k + d) % 2 * kNextToken);
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
          if (i % 2 == 0 && i >= count) break;  // units beyond the last are multiplied, but not kept
          if (i + 1 < kUnits) load_dy(i + 1);
#pragma unroll
          for (int d = 0; d < kDepths; ++d) sums[i].Add(x[d], dy[i % 2][d]);
          if (i + 1 < kUnits && (starts >> (i + 1) & 1)) load_x(i + 1);
        }
      }
    });

#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (i >= count) break;
      sums[i].template Store<kUnit>(stages + (first + i) * (kUnit * kUnit * 4), 0, 0, lane);
    }
  }
};

template <int kUnit>
struct LargeTF32Consumers {
  using Shape = SddmmShape<float, kUnit, 32>;
  static constexpr int kPanelsOfUnit = kUnit / Shape::kPanel, kPairs = kPanelsOfUnit / 2;  // of panels of dy
  static constexpr int kWarpsOfPair = kProductWarps / kPairs;
  static constexpr int kMostPanels = Shape::kCapacity * kPanelsOfUnit / kWarpsOfPair;  // of x, of a warp
  static_assert(kUnit == 64 || kUnit == 128);
  static_assert(Shape::kCapacity * kPanelsOfUnit % kWarpsOfPair == 0 && Shape::kPanel == 32);

  static __device__ __forceinline__ void Multiply(const SddmmKernelParams& p, const SddmmTile<Shape>& tile,
                                                  SddmmRing ring, std::uint32_t stages, int warp) {
    const int lane = threadIdx.x % 32;
    const int pair = warp % kPairs, quarter = warp / kPairs % 4;
    SddmmHalf part = {0, tile.x_slabs, pair};
    if constexpr (kUnit == 64) part = tile.Half(p, warp / 4);
    const int before = quarter * part.count * kPanelsOfUnit / 4;
    const int first = part.first * kPanelsOfUnit + before;
    const int count = (quarter + 1) * part.count * kPanelsOfUnit / 4 - before;
    const std::uint32_t x_place = first * Shape::kPanelBytes + XPlace(lane);
    const std::uint32_t dy_place = tile.x_room * Shape::kSlabBytes + part.dy * 2 * Shape::kPanelBytes + DyPlace(lane);

    PieceSums<Shape::kPanel> sums[kMostPanels][2];
    ForEachStage(p, tile, ring, stages, [&](std::uint32_t stage) {
#pragma unroll
      for (int k = 0; k < Shape::kTokens / 8; ++k) {
        const std::uint32_t tokens = stage + k / 2 * (2 * kEightTokens), parity = k % 2 * kNextToken;
        XFragments<Shape::kPanel> x[2];
        DyFragments<Shape::kPanel> dy[2];
        const auto load_x = [&](int i) { Load(x[i % 2], tokens + i * Shape::kPanelBytes, x_place ^ parity); };
        load_x(0);
#pragma unroll
        for (int j = 0; j < 2; ++j) Load(dy[j], tokens + j * Shape::kPanelBytes, dy_place ^ parity);
#pragma unroll
        for (int i = 0; i < kMostPanels; ++i) {
          if (i >= count) break;
          if (i + 1 < kMostPanels && i + 1 < count) load_x(i + 1);
#pragma unroll
          for (int j = 0; j < 2; ++j) sums[i][j].Add(x[i % 2], dy[j]);
        }
      }
    });

#pragma unroll
    for (int i = 0; i < kMostPanels; ++i) {
      if (i >= count) break;
      const std::uint32_t unit = stages + (first + i) / kPanelsOfUnit * (kUnit * kUnit * 4);
      const int row = (first + i) % kPanelsOfUnit * Shape::kPanel;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sums[i][j].template Store<kUnit>(unit, row, (pair * 2 + j) * Shape::kPanel, lane);
      }
    }
  }
};

template <int kUnit>
using TF32Consumers =
    std::conditional_t < kUnit<64, SmallTF32Consumers<std::min(kUnit, 32)>, LargeTF32Consumers<std::max(kUnit, 64)>>;

template <int kUnit>
__global__ void __launch_bounds__(kSddmmThreads, 1) SddmmTF32Kernel(const __grid_constant__ SddmmKernelParams p) {
  RunSddmm<float, TF32Consumers<kUnit>>(p);
}

}  // namespace jax_blocksparse::sm90
