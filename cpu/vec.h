// Vectors of the compiler's vector extension, and the element types with their conversions.
//
// This header, microkernel.h, matmul.h and sddmm.h are compiled once per instruction set. All they define lies in a
// namespace named after it: the linker must never take a function compiled for AVX for the baseline's.
#ifndef JAX_BLOCKSPARSE_CPU_VEC_H_
#define JAX_BLOCKSPARSE_CPU_VEC_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define JAX_BLOCKSPARSE_INLINE inline __attribute__((always_inline))

namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

template <typename T, int kLanes>
struct VecOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T, int kLanes>
using Vec = typename VecOf<T, kLanes>::type;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Products of 16-bit numbers are summed in f32.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
JAX_BLOCKSPARSE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Loads of kLanes elements as accumulators, from memory of any alignment.
template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<float, kLanes> load(const float* p) {
  Vec<float, kLanes> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<double, kLanes> load(const double* p) {
  Vec<double, kLanes> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<uint32_t, kLanes> load_bits(const void* p) {
  Vec<uint16_t, kLanes> half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vec<uint32_t, kLanes>);
}

template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<float, kLanes> load(const BF16* p) {
  return bit_cast<Vec<float, kLanes>>(load_bits<kLanes>(p) << 16);
}

#if defined(__F16C__)
template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<float, kLanes> load(const F16* p) {
  Vec<float, kLanes> v;
  if constexpr (kLanes == 4) {
    const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    std::memcpy(&v, &four, sizeof(v));
  } else {
    for (int i = 0; i < kLanes; i += 8) {
      const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
      std::memcpy(reinterpret_cast<float*>(&v) + i, &eight, sizeof(eight));
    }
  }
  return v;
}
#else
// Touches no subnormal f32, so it does not depend on whether the thread flushes them to zero.
template <int kLanes>
JAX_BLOCKSPARSE_INLINE Vec<float, kLanes> load(const F16* p) {
  using Bits = Vec<uint32_t, kLanes>;
  const Bits half = load_bits<kLanes>(p);
  const Bits magnitude = half & 0x7fff;
  const Bits is_subnormal = bit_cast<Bits>(magnitude < 0x400);
  const Bits is_special = bit_cast<Bits>(magnitude >= 0x7c00);
  const Bits normal = ((magnitude << 13) + (112u << 23)) | (is_special & 0x7f800000);
  const auto fraction = __builtin_convertvector(bit_cast<Vec<int32_t, kLanes>>(magnitude), Vec<float, kLanes>);
  const Bits subnormal = bit_cast<Bits>(fraction * 0x1p-24f);
  return bit_cast<Vec<float, kLanes>>((subnormal & is_subnormal) | (normal & ~is_subnormal) | ((half & 0x8000) << 16));
}
#endif

JAX_BLOCKSPARSE_INLINE void store(float* p, float v) { *p = v; }
JAX_BLOCKSPARSE_INLINE void store(double* p, double v) { *p = v; }

// Round to nearest even; a NaN stays one (its payload's top bits, made quiet).
JAX_BLOCKSPARSE_INLINE void store(BF16* p, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

JAX_BLOCKSPARSE_INLINE void store(F16* p, float v) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // rounds to a subnormal: the last bit of 0.5f weighs as much as its last bit
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000));
#endif
}

// Copies n elements, widening them to accumulators.
template <typename T>
JAX_BLOCKSPARSE_INLINE void widen(const T* from, Accumulator<T>* to, int64_t n) {
  constexpr int kLanes = kVectorBytes / sizeof(Accumulator<T>);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto v = load<kLanes>(from + i);
    std::memcpy(to + i, &v, sizeof(v));
  }
  if (i < n) {
    T rest[kLanes] = {};
    std::memcpy(rest, from + i, (n - i) * sizeof(T));
    const auto v = load<kLanes>(rest);
    std::memcpy(to + i, &v, (n - i) * sizeof(Accumulator<T>));
  }
}

// Copies n accumulators, rounding them to the result's type.
template <typename U>
JAX_BLOCKSPARSE_INLINE void narrow(const Accumulator<U>* from, U* to, int64_t n) {
  if constexpr (std::is_same_v<U, Accumulator<U>>) {
    std::memcpy(to, from, n * sizeof(U));
  } else {
    for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
  }
}

// a0 b0 a1 b1 ... from the low (high) halves of a and b.
#if defined(__clang__) || __GNUC__ >= 12
#define JAX_BLOCKSPARSE_SHUFFLE(a, b, mask, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define JAX_BLOCKSPARSE_SHUFFLE(a, b, mask, ...) __builtin_shuffle(a, b, mask{__VA_ARGS__})
#endif

using Vec4f = Vec<float, 4>;
using Vec2d = Vec<double, 2>;
using Mask4 = Vec<int32_t, 4>;
using Mask2 = Vec<int64_t, 2>;

JAX_BLOCKSPARSE_INLINE void transpose(Vec4f (&r)[4]) {
  const Vec4f a = JAX_BLOCKSPARSE_SHUFFLE(r[0], r[2], Mask4, 0, 4, 1, 5);
  const Vec4f b = JAX_BLOCKSPARSE_SHUFFLE(r[0], r[2], Mask4, 2, 6, 3, 7);
  const Vec4f c = JAX_BLOCKSPARSE_SHUFFLE(r[1], r[3], Mask4, 0, 4, 1, 5);
  const Vec4f d = JAX_BLOCKSPARSE_SHUFFLE(r[1], r[3], Mask4, 2, 6, 3, 7);
  r[0] = JAX_BLOCKSPARSE_SHUFFLE(a, c, Mask4, 0, 4, 1, 5);
  r[1] = JAX_BLOCKSPARSE_SHUFFLE(a, c, Mask4, 2, 6, 3, 7);
  r[2] = JAX_BLOCKSPARSE_SHUFFLE(b, d, Mask4, 0, 4, 1, 5);
  r[3] = JAX_BLOCKSPARSE_SHUFFLE(b, d, Mask4, 2, 6, 3, 7);
}

JAX_BLOCKSPARSE_INLINE void transpose(Vec2d (&r)[2]) {
  const Vec2d a = JAX_BLOCKSPARSE_SHUFFLE(r[0], r[1], Mask2, 0, 2);
  r[1] = JAX_BLOCKSPARSE_SHUFFLE(r[0], r[1], Mask2, 1, 3);
  r[0] = a;
}

#undef JAX_BLOCKSPARSE_SHUFFLE

}  // namespace jax_blocksparse::JAX_BLOCKSPARSE_ISA

#endif  // JAX_BLOCKSPARSE_CPU_VEC_H_
