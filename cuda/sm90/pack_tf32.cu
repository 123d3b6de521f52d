// Packs float blocks for the matmul kernels, rounded to TF32.
//
// Blocks of 8 to 32 become registers of a warp that holds a piece of 16 features x 8 depths as the left operand of a
// product, as in pack.cu: four elements for each lane, or two of a block of 8. Blocks of 64 and 128 become what their
// rows are for: one for each feature. Either way a thread writes four elements at a time, which it fetches one by one:
// a warp's loads make whole sectors of memory, and every thread has sixteen under way, so that memory bounds this.
#include "../launch.cuh"
#include "pack.h"
#include "problem.h"
#include "ptx.cuh"

namespace jax_blocksparse::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kFours = 4;  // that a thread writes

struct Place {
  int feature, depth;
};

// Where in a block the elements of a thread come from.
template <int kBlock>
__device__ __forceinline__ Place Source(int four, int element) {
  const int lane = four % 32;
  if constexpr (kBlock == 8) {  // a lane of the product has two elements
    return {four / 2, four % 2 * 2 + element / 2 + element % 2 * 4};
  } else if constexpr (kBlock < 64) {
    constexpr int kAcross = kBlock / 8;  // pieces along the depth
    const int piece = four / 32;
    return {piece / kAcross * 16 + lane / 4 + element % 2 * 8, piece % kAcross * 8 + lane % 4 + element / 2 * 4};
  } else {  // a warp has 8 features x 16 depths
    constexpr int kAcross = kBlock / 16;
    const int piece = four / 32;
    return {piece / kAcross * 8 + lane / 4, piece % kAcross * 16 + lane % 4 * 4 + element};
  }
}

// Where in a packed block they go, in fours.
template <int kBlock>
__device__ __forceinline__ int Target(int four) {
  if constexpr (kBlock < 64) return four;
  const Place first = Source<kBlock>(four, 0);
  return (first.feature * kBlock + first.depth) / 4;
}

__device__ __forceinline__ float Round(float value) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
}

template <int kBlock, bool kTranspose>
__global__ void __launch_bounds__(kThreads) PackKernel(const PackParams p) {
  constexpr int kArea = kBlock * kBlock, kFoursOfBlock = kArea / 4;
  static_assert(kBlock == 8 || kFoursOfBlock % 32 == 0, "a warp's fours are of one block");
  const std::int64_t fours = std::int64_t{p.nnz} * kFoursOfBlock;  // of each batch element
  const std::int64_t ctas = CeilDiv(fours, kThreads * kFours);
  const std::int64_t batch = blockIdx.x / ctas, first = (blockIdx.x - batch * ctas) * kThreads * kFours + threadIdx.x;
  const auto* data = static_cast<const float*>(p.data) + batch * p.data_batch_stride;
  auto* packed = static_cast<float4*>(p.packed) + batch * fours;
  const std::int32_t* order = p.order + batch * p.order_batch_stride;
  const std::int32_t* inner = p.inner + batch * p.inner_batch_stride;

  // All loads of a kind are under way before the first is waited for.
  int ids[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const std::int64_t four = first + i * kThreads, position = four / kFoursOfBlock;
    ids[i] = four >= fours ? -1 : kBlock < 64 ? __ldg(order + position) : static_cast<int>(position);
  }
  std::int64_t depths[kFours];  // that exist
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const bool is_there = ids[i] >= 0 && ids[i] < p.nnz;
    depths[i] = is_there ? p.in_features - std::int64_t{__ldg(inner + ids[i])} * kBlock : 0;
  }
  float values[kFours][4] = {};
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Place from = Source<kBlock>((first + i * kThreads) % kFoursOfBlock, j);
      const int offset = kTranspose ? from.feature * kBlock + from.depth : from.depth * kBlock + from.feature;
      if (from.depth < depths[i]) values[i][j] = __ldg(data + std::int64_t{ids[i]} * kArea + offset);
    }
  }
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const std::int64_t four = first + i * kThreads;
    if (four >= fours) break;
    const std::int64_t block = four / kFoursOfBlock * kFoursOfBlock;
    const float (&v)[4] = values[i];
    packed[block + Target<kBlock>(four % kFoursOfBlock)] = {Round(v[0]), Round(v[1]), Round(v[2]), Round(v[3])};
  }
}

template <int kBlock, bool kTranspose>
cudaError_t LaunchBlock(const PackParams& params, cudaStream_t stream) {
  const std::int64_t fours = std::int64_t{params.nnz} * (kBlock * kBlock / 4);
  return Launch<PackKernel<kBlock, kTranspose>>(params, params.batch * CeilDiv(fours, kThreads * kFours), kThreads, 0,
                                                stream);
}

template <int kBlock>
cudaError_t LaunchSmallBlock(const PackParams& params, cudaStream_t stream) {
  return params.transpose ? LaunchBlock<kBlock, true>(params, stream) : LaunchBlock<kBlock, false>(params, stream);
}

// Transposed, large blocks are multiplied as they are.
template <int kBlock>
cudaError_t LaunchLargeBlock(const PackParams& params, cudaStream_t stream) {
  return params.transpose ? cudaErrorInvalidValue : LaunchBlock<kBlock, false>(params, stream);
}

}  // namespace

cudaError_t LaunchPackTF32(const PackParams& params, cudaStream_t stream) {
  if (params.nnz == 0 || params.batch == 0) return cudaSuccess;
  switch (params.block) {
    case 8:
      return LaunchSmallBlock<8>(params, stream);
    case 16:
      return LaunchSmallBlock<16>(params, stream);
    case 32:
      return LaunchSmallBlock<32>(params, stream);
    case 64:
      return LaunchLargeBlock<64>(params, stream);
    case 128:
      return LaunchLargeBlock<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
