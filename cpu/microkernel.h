// The register-blocked loop under every product: C[rows x kWidth] += sum over k of A(row, k) B(k, :).
//
// B is a packed strip: kWidth accumulators for each k, aligned, one k after another. A is read one number at a time and
// broadcast, so any layout will do: matmul reads rows of x in place, sddmm columns of packed tokens.
#ifndef JAX_BLOCKSPARSE_CPU_MICROKERNEL_H_
#define JAX_BLOCKSPARSE_CPU_MICROKERNEL_H_

#include "vec.h"

namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA {

// k consecutive steps of a sum: A(row, i) for i < k, found from `a`.
template <typename Acc>
struct Segment {
  const Acc* a;
  int64_t k;
};

// How A lies in memory: which of its two strides is 1 and how large the other one is.
struct RowMajor {
  int64_t pitch;
  JAX_BLOCKSPARSE_INLINE int64_t at_row(int64_t row) const { return row * pitch; }
  JAX_BLOCKSPARSE_INLINE int64_t step() const { return 1; }
};
struct ColumnMajor {
  int64_t pitch;
  JAX_BLOCKSPARSE_INLINE int64_t at_row(int64_t row) const { return row; }
  JAX_BLOCKSPARSE_INLINE int64_t step() const { return pitch; }
};

template <typename Acc, int kWidth_>
struct Strip {
  static constexpr int kWidth = kWidth_;
  static constexpr int kNative = kVectorBytes / sizeof(Acc);
  static constexpr int kLanes = kWidth < kNative ? kWidth : kNative;
  static constexpr int kVectors = kWidth / kLanes;
  // Three quarters of the registers accumulate; the others hold a row of B and the broadcast. More than 12 rows would
  // want more addresses than there are integer registers.
  static constexpr int kMaxRows = kVectorRegisters * 3 / 4 / kVectors < 12 ? kVectorRegisters * 3 / 4 / kVectors : 12;

  template <int kRows, typename Layout>
  static void multiply(const Segment<Acc>* segments, int count, Layout layout, int64_t row, const Acc* b, Acc* c,
                       int64_t c_pitch, bool accumulate) {
    using V = Vec<Acc, kLanes>;
    V sum[kRows][kVectors] = {};
    for (int s = 0; s < count; ++s) {
      const Acc* a = segments[s].a + layout.at_row(row);
      for (int64_t k = segments[s].k; k > 0; --k) {
        V b_row[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) b_row[v] = load<kLanes>(b + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) sum[r][v] += a[layout.at_row(r)] * b_row[v];
        }
        a += layout.step();
        b += kWidth;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        Acc* to = c + r * c_pitch + v * kLanes;
        if (accumulate) sum[r][v] += load<kLanes>(to);
        std::memcpy(to, &sum[r][v], sizeof(V));
      }
    }
  }

  // multiply<rows>, rows from 1 to kMaxRows.
  template <typename Layout, int kRows = kMaxRows>
  JAX_BLOCKSPARSE_INLINE static void multiply(int rows, const Segment<Acc>* segments, int count, Layout layout,
                                              int64_t row, const Acc* b, Acc* c, int64_t c_pitch, bool accumulate) {
    if constexpr (kRows > 1) {
      if (rows < kRows) {
        multiply<Layout, kRows - 1>(rows, segments, count, layout, row, b, c, c_pitch, accumulate);
        return;
      }
    }
    multiply<kRows>(segments, count, layout, row, b, c, c_pitch, accumulate);
  }
};

// Calls body(first row, rows) for near-equal tiles of at most `most` rows: 32 rows in tiles of 6, 6, 5, 5, 5, 5 keep
// the multipliers busier than 6, 6, 6, 6, 6, 2.
template <typename Body>
JAX_BLOCKSPARSE_INLINE void for_each_row_tile(int64_t rows, int64_t most, Body body) {
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
    body(begin, static_cast<int>(end - begin));
  }
}

// Calls body(Strip) with the widest strip that divides blocks of this size: two native vectors where they fit.
template <typename Acc, typename Body, int kWidth = 2 * kVectorBytes / static_cast<int>(sizeof(Acc))>
JAX_BLOCKSPARSE_INLINE void with_strip(int block, Body body) {
  if constexpr (kWidth > 8) {
    if (block < kWidth) return with_strip<Acc, Body, kWidth / 2>(block, body);
  }
  body(Strip<Acc, kWidth>{});
}

}  // namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA

#endif  // JAX_BLOCKSPARSE_CPU_MICROKERNEL_H_
