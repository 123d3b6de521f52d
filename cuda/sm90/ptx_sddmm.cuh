// PTX instructions of sm_90a that only the sampled product needs.
#pragma once

#include "ptx.cuh"
#include "sum_operands.cuh"

namespace jax_blocksparse::sm90 {

// Threads of some warps. Barrier 0 is __syncthreads.
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void StoreShared8(std::uint32_t to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ void StoreShared4(std::uint32_t to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

__device__ __forceinline__ float4 LoadShared16(std::uint32_t from) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(from)
               : "memory");
  return value;
}

__device__ __forceinline__ std::uint32_t LoadShared4(std::uint32_t from) {
  std::uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

// Brings a tensor map to where copies look for it, without waiting.
__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Warpgroup products of operands in shared memory that are both MN-major ----

// Such an operand: rows of 64 m or n, one for each depth, with the 128-byte swizzle, 8 rows to a group of 1024 bytes.
// The next 64 m or n, if the product is wider, lie `panel` bytes on.
__device__ __forceinline__ std::uint64_t MNMajorDescriptor(std::uint32_t address, std::uint32_t panel) {
  constexpr std::uint32_t kSwizzle128 = 1u << 30, kGroupStride = 1024 >> 4;
  return std::uint64_t{kSwizzle128 | kGroupStride} << 32 | panel >> 4 << 16 | (address & 0x3ffff) >> 4;
}

// In the instruction: add to the sum, negate neither, both transposed.
#define JBS_MULTIPLY_MN_MAJOR(n, regs, type, a, b)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " JBS_SUM##regs "}, " a ", " b     \
                                                                                                 ", 1, 1, 1, 1, 1;" \
               : JBS_INOUT##regs(sum)                                                                               \
               : "l"(a_descriptor), "l"(b_descriptor))

// `sum` has the 64 m times kSums * 2 n of the product, of which it is the first part.
template <typename T, int kSums>
__device__ __forceinline__ void MultiplyMNMajor(float* sum, std::uint64_t a_descriptor, std::uint64_t b_descriptor) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kSums == 32 || kSums == 64 || kSums == 96 || kSums == 128, "64 to 256 columns");
  if constexpr (kSums == 32 && kHalf) {
    JBS_MULTIPLY_MN_MAJOR(64, 32, "f16", "%32", "%33");
  } else if constexpr (kSums == 32) {
    JBS_MULTIPLY_MN_MAJOR(64, 32, "bf16", "%32", "%33");
  } else if constexpr (kSums == 64 && kHalf) {
    JBS_MULTIPLY_MN_MAJOR(128, 64, "f16", "%64", "%65");
  } else if constexpr (kSums == 64) {
    JBS_MULTIPLY_MN_MAJOR(128, 64, "bf16", "%64", "%65");
  } else if constexpr (kSums == 96 && kHalf) {
    JBS_MULTIPLY_MN_MAJOR(192, 96, "f16", "%96", "%97");
  } else if constexpr (kSums == 96) {
    JBS_MULTIPLY_MN_MAJOR(192, 96, "bf16", "%96", "%97");
  } else if constexpr (kHalf) {
    JBS_MULTIPLY_MN_MAJOR(256, 128, "f16", "%128", "%129");
  } else {
    JBS_MULTIPLY_MN_MAJOR(256, 128, "bf16", "%128", "%129");
  }
}

#undef JBS_MULTIPLY_MN_MAJOR

}  // namespace jax_blocksparse::sm90
