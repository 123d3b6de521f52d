// Packs blocks of 8, 16 and 32 for the matmul kernel.
//
// A block is cut into pieces of 16 features x 16 depths, stored as the registers of a warp that holds the piece as the
// left operand of a product: 16 bytes for each lane, which the matmul kernel reads as they are. A block of 32 is four
// such pieces, feature by feature; a block of 8 is a quarter of one, a register for each lane. A warp takes 2 KB at a
// time through shared memory, where ldmatrix puts the elements into place, transposing or not. What bounds it is
// memory: every warp of the grid has its 2 KB in flight at once.
#include "../launch.cuh"
#include "pack.h"
#include "problem.h"
#include "ptx.cuh"

namespace jax_blocksparse::sm90 {
namespace {

constexpr int kWarps = 8;
constexpr int kWarpBytes = 2048;
constexpr int kPieces = kWarpBytes / 16 / 32;  // of 16 bytes, for each lane

// Rows of blocks follow each other without gaps; the 16-byte pieces of 128 bytes are permuted so that eight rows of
// a matrix are in different banks, whatever the block size.
__device__ __forceinline__ std::uint32_t Place(std::uint32_t offset) { return offset ^ (offset >> 7 << 4 & 0x70); }

template <int kBlock, bool kTranspose>
__global__ void __launch_bounds__(kWarps * 32) PackKernel(const PackParams p) {
  constexpr int kBlockBytes = kBlock * kBlock * 2;
  constexpr int kBlocks = kWarpBytes / kBlockBytes;  // that a warp takes
  static_assert(kBlock == 8 || kBlock == 16 || kBlock == 32, "a warp takes whole blocks, a row is at least 16 bytes");
  __shared__ __align__(128) unsigned char shared[kWarps][kWarpBytes];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t groups = CeilDiv(p.nnz, kBlocks);  // of blocks, in each batch element
  const std::int64_t group = blockIdx.x * static_cast<std::int64_t>(kWarps) + warp;
  if (group >= groups * p.batch) return;
  const std::int64_t batch = group / groups;
  const int first = static_cast<int>(group - batch * groups) * kBlocks;
  const std::int64_t block_elements = kBlock * kBlock;
  const auto* data = static_cast<const std::uint16_t*>(p.data) + batch * p.data_batch_stride;
  auto* packed = static_cast<std::uint16_t*>(p.packed) + (batch * p.nnz + first) * block_elements;
  const std::int32_t* order = p.order + batch * p.order_batch_stride;
  const std::int32_t* inners = p.inner + batch * p.inner_batch_stride;

  // All loads of a kind are under way before the first is waited for.
  int ids[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int position = first + (i * 32 + lane) * 16 / kBlockBytes;
    ids[i] = position < p.nnz ? __ldg(order + position) : -1;
  }
  uint4 pieces[kPieces];
  std::int64_t depths[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int offset = (i * 32 + lane) * 16 % kBlockBytes;
    const int row = offset / (kBlock * 2), column = offset % (kBlock * 2) / 2;
    const bool is_there = ids[i] >= 0 && ids[i] < p.nnz;
    const std::int64_t start = ids[i] * block_elements + row * kBlock + column;
    pieces[i] = is_there ? __ldg(reinterpret_cast<const uint4*>(data + start)) : uint4{};
    const std::int64_t inner = is_there ? __ldg(inners + ids[i]) : 0;
    depths[i] = inner * kBlock + (kTranspose ? column : row);
  }

  const std::uint32_t blocks = SharedAddress(shared[warp]);
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    StoreShared16(blocks + Place((i * 32 + lane) * 16), depths[i] < p.in_features ? pieces[i] : uint4{});
  __syncwarp();

#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    // Matrices 0 and 1 are features 0-7 and 8-15 of depths 0-7, matrices 2 and 3 of depths 8-15.
    const int matrix = lane / 8, row = lane % 8;
    std::uint32_t registers[4];
    if constexpr (kBlock == 8) {
      LoadMatrices<!kTranspose>(registers, blocks + Place((i * 4 + matrix) * kBlockBytes + row * 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + i * 4 + j >= p.nnz) break;
        reinterpret_cast<std::uint32_t*>(packed)[(i * 4 + j) * 32 + lane] = registers[j];
      }
    } else {
      constexpr int kAcross = kBlock / 16;  // pieces of 16 x 16 in a row of a block
      const int inside = i % (kAcross * kAcross);
      const int depth = inside % kAcross * 16 + matrix / 2 * 8, feature = inside / kAcross * 16 + matrix % 2 * 8;
      const int r = (kTranspose ? feature : depth) + row, column = kTranspose ? depth : feature;
      const int block = i / (kAcross * kAcross);
      LoadMatrices<!kTranspose>(registers, blocks + Place(block * kBlockBytes + (r * kBlock + column) * 2));
      if (first + block >= p.nnz) break;
      reinterpret_cast<uint4*>(packed)[i * 32 + lane] = {registers[0], registers[1], registers[2], registers[3]};
    }
  }
}

template <int kBlock>
cudaError_t LaunchBlock(const PackParams& params, cudaStream_t stream) {
  const std::int64_t groups = params.batch * CeilDiv(params.nnz, kWarpBytes / (kBlock * kBlock * 2));
  const std::int64_t ctas = CeilDiv(groups, kWarps);
  return params.transpose ? Launch<PackKernel<kBlock, true>>(params, ctas, kWarps * 32, 0, stream)
                          : Launch<PackKernel<kBlock, false>>(params, ctas, kWarps * 32, 0, stream);
}

}  // namespace

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream) {
  if (params.nnz == 0 || params.batch == 0) return cudaSuccess;
  switch (params.block) {
    case 8:
      return LaunchBlock<8>(params, stream);
    case 16:
      return LaunchBlock<16>(params, stream);
    case 32:
      return LaunchBlock<32>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_blocksparse::sm90
