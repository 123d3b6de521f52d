// PTX instructions of sm_90a, one thin function each: barriers, tensor copies, warpgroup products. Shared memory
// addresses are 32-bit, as PTX wants them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ptx.cuh"
#include "element.cuh"
#include "sum_operands.cuh"

namespace jax_blocksparse::sm90 {

// ---- Barriers in shared memory ----

__device__ __forceinline__ void Arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same for the barrier at this address in CTA `rank` of the cluster. The forms that say .release.cluster cost
// several times as much.
__device__ __forceinline__ void ArriveAt(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::
          "r"(barrier),
      "r"(rank)
      : "memory");
}

// Whether the phase of this parity is over.
__device__ __forceinline__ bool TestBarrier(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

// Threads of one warpgroup. Barrier 0 is __syncthreads.
__device__ __forceinline__ void SyncWarpgroup(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// Of two teams of kThreads in all, the one that waits goes on when the other one has passed it the turn. Each team has
// a barrier of its own to wait at.
template <int kThreads>
__device__ __forceinline__ void WaitForTurn(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void PassTurn(int barrier_of_other) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier_of_other), "n"(kThreads) : "memory");
}

__device__ __forceinline__ std::uint32_t ClusterRank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Hands registers of a warpgroup back to the SM or takes some more. The compiler plans with these numbers.
template <int kRegisters>
__device__ __forceinline__ void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Tensor copies. Coordinates count elements, innermost first; what lies outside the tensor arrives as zero. ----

__device__ __forceinline__ void LoadTensor(std::uint32_t to, const CUtensorMap* from, int c0, int c1, int c2,
                                           std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(from), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
      : "memory");
}

// Four bytes by the calling thread, on its own account; zeros if the condition does not hold.
__device__ __forceinline__ void LoadWord(std::uint32_t to, const void* from, bool condition) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(condition ? 4 : 0) : "memory");
}

// Waits for all of the thread's words.
__device__ __forceinline__ void WaitForWords() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// LoadTensor into every CTA of the cluster that `ctas` has a bit for, at the same address, signalling each one's
// barrier.
__device__ __forceinline__ void LoadTensorMulticast(std::uint32_t to, const CUtensorMap* from, int c0, int c1, int c2,
                                                    std::uint32_t barrier, std::uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(from), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(ctas)
      : "memory");
}

// What is stored is the first to leave L2 if something else needs the room.
__device__ __forceinline__ void StoreTensor(const CUtensorMap* to, int c0, int c1, int c2, std::uint32_t from) {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%1, %2, %3}], [%4], %5;" ::"l"(
          to),
      "r"(c0), "r"(c1), "r"(c2), "r"(from), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void CommitStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void WaitForStoreReads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes ordinary writes to shared memory visible to tensor copies.
__device__ __forceinline__ void FenceForCopies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void StoreShared4(std::uint32_t to, std::uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint2 LoadShared8(std::uint32_t from) {
  uint2 values;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(values.x), "=r"(values.y) : "r"(from) : "memory");
  return values;
}

// Zero if the condition does not hold; then nothing is read.
__device__ __forceinline__ std::uint32_t LoadShared4OrZero(bool condition, std::uint32_t from) {
  std::uint32_t value;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.shared.u32 %0, [%1];}"
               : "=&r"(value)
               : "r"(from), "r"(static_cast<std::uint32_t>(condition))
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 LoadShared8OrZero(bool condition, std::uint32_t from) {
  uint2 values;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; @p ld.shared.v2.u32 {%0, %1}, [%2];}"
               : "=&r"(values.x), "=&r"(values.y)
               : "r"(from), "r"(static_cast<std::uint32_t>(condition))
               : "memory");
  return values;
}

// Leaves the values as they are if the condition does not hold.
__device__ __forceinline__ void LoadShared16If(bool condition, std::uint32_t (&values)[4], std::uint32_t from) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(values[0]), "+r"(values[1]), "+r"(values[2]), "+r"(values[3])
               : "r"(from), "r"(static_cast<std::uint32_t>(condition))
               : "memory");
}

// Four 8x8 matrices of 16-bit elements, each stored transposed; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void StoreMatricesTransposed(std::uint32_t row_address, std::uint32_t m0, std::uint32_t m1,
                                                        std::uint32_t m2, std::uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

template <typename T>
__device__ __forceinline__ std::uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 Unpack(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// ---- Warpgroup products: sum (64 x N, float) += A (64 x K) B (K x N), K being 16 or, of floats, 8 ----

// The operand at an address in shared memory, in rows of 128 bytes with the 128-byte swizzle, 8 rows to a group of
// 1024 bytes. Both meanings of the rows use it: rows of depths, one for each m or n ("K-major"), and, of 16-bit
// elements, rows of 64 m, one for each depth ("MN-major"; A of at most 64 m only, because no second group of 64 is
// described).
template <int kBytesOfRow = kRowBytes>
__device__ __forceinline__ std::uint64_t OperandDescriptor(std::uint32_t address) {
  static_assert(kBytesOfRow == 64 || kBytesOfRow == 128, "as many bytes as a swizzle is over");
  constexpr std::uint32_t kSwizzle = kBytesOfRow == 64 ? 2u << 30 : 1u << 30;
  constexpr std::uint32_t kGroupStride = 8 * kBytesOfRow >> 4, kUnusedStride = 1u << 16;
  return std::uint64_t{kSwizzle | kGroupStride} << 32 | kUnusedStride | (address & 0x3ffff) >> 4;
}

// What the next product along the depths adds to a descriptor.
constexpr std::uint32_t kDepthStepKMajor = kDepthBytes >> 4;
constexpr std::uint32_t kDepthStepMNMajor = 16 * 128 >> 4;

__device__ __forceinline__ void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers of products under way must stay where they are until the wait. Without these fences right after the wait
// the compiler moves them, without a warning and with wrong results.
template <int kCount>
__device__ __forceinline__ void KeepRegisters(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void KeepRegisters(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <typename R, int kRows, int kCount>
__device__ __forceinline__ void KeepRegisters(R (&registers)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) KeepRegisters(registers[i]);
}
template <typename R, int kPlanes, int kRows, int kCount>
__device__ __forceinline__ void KeepRegisters(R (&registers)[kPlanes][kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kPlanes; ++i) KeepRegisters(registers[i]);
}

// Shape, types, and what follows the operands "add to the sum, negate neither": whether they are MN-major, which only
// 16-bit elements can be.
#define JBS_BF16(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#define JBS_F16(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#define JBS_TF32(n) "wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 "

// A in registers, B K-major in shared memory.
#define JBS_MULTIPLY_REGISTERS(instruction, regs, a0, a1, a2, a3, b, majors)                              \
  asm volatile(instruction JBS_SUM##regs "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", 1, 1, 1" majors ";" \
               : JBS_INOUT##regs(sum)                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor))
#define JBS_MULTIPLY_REGISTERS_OF(n, regs, a0, a1, a2, a3, b)            \
  if constexpr (std::is_same_v<T, float>) {                              \
    JBS_MULTIPLY_REGISTERS(JBS_TF32(n), regs, a0, a1, a2, a3, b, "");    \
  } else if constexpr (std::is_same_v<T, __half>) {                      \
    JBS_MULTIPLY_REGISTERS(JBS_F16(n), regs, a0, a1, a2, a3, b, ", 0");  \
  } else {                                                               \
    JBS_MULTIPLY_REGISTERS(JBS_BF16(n), regs, a0, a1, a2, a3, b, ", 0"); \
  }

template <typename T, int kSums>
__device__ __forceinline__ void MultiplyRegisters(float (&sum)[kSums], const std::uint32_t (&a)[4],
                                                  std::uint64_t b_descriptor) {
  static_assert(kSums == 32 || kSums == 64 || kSums == 128, "64, 128 or 256 columns");
  if constexpr (kSums == 32) {
    JBS_MULTIPLY_REGISTERS_OF(64, 32, "%32", "%33", "%34", "%35", "%36");
  } else if constexpr (kSums == 64) {
    JBS_MULTIPLY_REGISTERS_OF(128, 64, "%64", "%65", "%66", "%67", "%68");
  } else {
    JBS_MULTIPLY_REGISTERS_OF(256, 128, "%128", "%129", "%130", "%131", "%132");
  }
}

// Both in shared memory: A K-major or, with kMNMajorA, MN-major; B K-major.
#define JBS_MULTIPLY_SHARED(instruction, regs, a, b, majors)                   \
  asm volatile(instruction JBS_SUM##regs "}, " a ", " b ", 1, 1, 1" majors ";" \
               : JBS_INOUT##regs(sum)                                          \
               : "l"(a_descriptor), "l"(b_descriptor))
#define JBS_MULTIPLY_SHARED_OF(n, regs, a, b)                    \
  if constexpr (std::is_same_v<T, float>) {                      \
    JBS_MULTIPLY_SHARED(JBS_TF32(n), regs, a, b, "");            \
  } else if constexpr (std::is_same_v<T, __half> && kMNMajorA) { \
    JBS_MULTIPLY_SHARED(JBS_F16(n), regs, a, b, ", 1, 0");       \
  } else if constexpr (std::is_same_v<T, __half>) {              \
    JBS_MULTIPLY_SHARED(JBS_F16(n), regs, a, b, ", 0, 0");       \
  } else if constexpr (kMNMajorA) {                              \
    JBS_MULTIPLY_SHARED(JBS_BF16(n), regs, a, b, ", 1, 0");      \
  } else {                                                       \
    JBS_MULTIPLY_SHARED(JBS_BF16(n), regs, a, b, ", 0, 0");      \
  }

template <typename T, bool kMNMajorA, int kSums>
__device__ __forceinline__ void MultiplyShared(float (&sum)[kSums], std::uint64_t a_descriptor,
                                               std::uint64_t b_descriptor) {
  static_assert(kSums == 32 || kSums == 64 || kSums == 128, "64, 128 or 256 columns");
  static_assert(!(kMNMajorA && std::is_same_v<T, float>), "floats are read along the depth");
  if constexpr (kSums == 32) {
    JBS_MULTIPLY_SHARED_OF(64, 32, "%32", "%33");
  } else if constexpr (kSums == 64) {
    JBS_MULTIPLY_SHARED_OF(128, 64, "%64", "%65");
  } else {
    JBS_MULTIPLY_SHARED_OF(256, 128, "%128", "%129");
  }
}

#undef JBS_MULTIPLY_SHARED_OF
#undef JBS_MULTIPLY_SHARED
#undef JBS_MULTIPLY_REGISTERS_OF
#undef JBS_MULTIPLY_REGISTERS
#undef JBS_TF32
#undef JBS_F16
#undef JBS_BF16

}  // namespace jax_blocksparse::sm90
