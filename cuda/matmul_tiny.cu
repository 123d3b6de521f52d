// y = x W and dx = dy W^T of matrices so small that a CTA has room for all their blocks, on tensor cores.
//
// Only latency matters here, so there is one read from memory and nothing that it waits for: each CTA asks at once for
// whatever it could need, that is ptr, order, inner, all blocks and its tokens of x, and follows the lists when all of
// that has come. A warp computes 16 tokens times eight features. A step of its walk is 32 deep: each eight lanes find
// eight depths of a block in the lists, a step's all in one block or in up to four, and give ldmatrix the addresses of
// its rows and of those of x, or of zeros where there is no block. What bounds it: the launch takes half of the time,
// the rest is the read and the chain from there through the lists to the sums.
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "mma_tile.cuh"
#include "skinny_results.cuh"
#include "tiny.cuh"

namespace jax_blocksparse {
namespace {

constexpr int kWarps = kTinyThreads / 32;
constexpr int kTileTokens = 16, kTileFeatures = 8;  // of a warp
constexpr int kSums = kTileTokens * kTileFeatures;
constexpr int kMaxDataBytes = 32 * 1024;
static_assert(kTileFeatures == kChunk && kMaxDataBytes / (8 * 8 * 2) <= kTinyThreads,
              "a thread copies one entry of lists");

// Where what lies in shared memory, in bytes. In front is a chunk of zeros.
struct TinyRoom {
  static constexpr std::uint32_t kX = kChunkBytes;
  std::uint32_t data, order, inner, end;

  TinyRoom() = default;
  TinyRoom(const TinyRows& rows, std::uint32_t nnz, int block)
      : data(kX + kTileTokens * rows.Pitch()),
        order(data + nnz * (block * block * 2)),
        inner(order + nnz * 4),
        end(inner + nnz * 4) {}
};

// What every call needs comes first: parameters are read from memory, too, a line at a time.
struct TinyParams {
  const void* data;
  const std::int32_t *order, *inner, *ptr;
  const void* x;
  void* y;
  std::int32_t nnz, out_features, in_features, tokens;
  TinyRows rows;
  TinyRoom room;
  bool is_plain;  // y has whole chunks of elements like those of x, and no epilogue
  MatmulParams product;
  Epilogue epilogue;
};

// The blocks are an array of chunks; those of a line are permuted, for ldmatrix to find rows in different banks.
template <int kBlock>
struct TinyBlock {
  static constexpr int kRowChunks = kBlock / kChunk;
  static constexpr int kChunks = kBlock * kRowChunks;
  static constexpr int kDepths = std::min(kRowChunks, 4);  // chunks of a block's depth in a step
  static constexpr int kSteps = kRowChunks / kDepths;      // that a block takes
  static constexpr int kEntries = 4 / kDepths;             // blocks in a step
  static constexpr int kLine = std::max(kRowChunks, 8);
  static_assert(kDepths * kEntries == 4 && kDepths * kSteps == kRowChunks, "four chunks of depth in a step");

  static __device__ std::uint32_t Permuted(std::uint32_t chunk) {
    return chunk ^ (chunk / kLine & (std::min(kRowChunks, 8) - 1));
  }
};

template <typename T, bool kTranspose, int kBlock>
__global__ void __launch_bounds__(kTinyThreads) MatmulTinyKernel(const __grid_constant__ TinyParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  using Block = TinyBlock<kBlock>;
  const std::uint32_t thread = threadIdx.x, lane = thread % 32, nnz = Now(p.nnz),
                      first_token = blockIdx.y * kTileTokens;
  const std::uint32_t feature = (blockIdx.x * kWarps + thread / 32) * kTileFeatures;
  const std::uint32_t base = Now(SharedAddress(shared));
  const std::uint32_t tokens = min(p.tokens - first_token, kTileTokens);

  const std::int32_t* const ptr = p.ptr + feature / kBlock;
  const int ptr_begin = LoadIf(feature < p.out_features, ptr, 0);
  const int ptr_end = LoadIf(feature < p.out_features, ptr + 1, 0);
  const auto copy_entry = [&](std::uint32_t i) {
    CopyAsync<4>(base + p.room.order + i * 4, p.order + i);
    CopyAsync<4>(base + p.room.inner + i * 4, p.inner + i);
  };
  const auto copy_weights = [&](std::uint32_t i) {
    CopyAsync<16>(base + p.room.data + Block::Permuted(i) * kChunkBytes, static_cast<const uint4*>(p.data) + i);
  };
  const uint4* const x = static_cast<const uint4*>(p.x) + std::uint64_t{first_token} * p.rows.chunks;
  const auto copy_x = [&](std::uint32_t i) { p.rows.CopyChunk(base + TinyRoom::kX, x, tokens, i); };
  ForShare(nnz * Block::kChunks, copy_weights);
  ForShare(tokens * p.rows.chunks, copy_x);
  ForShare(nnz, copy_entry);
  if (thread == 0) StoreShared16(base, make_uint4(0, 0, 0, 0));
  ForRestOfShare(nnz * Block::kChunks, copy_weights);
  ForRestOfShare(tokens * p.rows.chunks, copy_x);
  CommitCopies();

  // Chunks of depth that a lane finds, the first of a block.
  const std::uint32_t row = lane % 8, depth = lane / 8 % Block::kDepths, slice = feature / 8 % Block::kRowChunks;
  const std::uint32_t x_place = Now(base + TinyRoom::kX + row * p.rows.Pitch() + depth * kChunkBytes);
  const std::uint32_t x_step = Now(8 * p.rows.Pitch());
  std::uint32_t weights_place[Block::kSteps], rows[Block::kSteps];
#pragma unroll
  for (int step = 0; step < Block::kSteps; ++step) {
    const std::uint32_t part = depth + step * Block::kDepths;
    const std::uint32_t chunk =
        kTranspose ? (slice * 8 + row) * Block::kRowChunks + part : (part * 8 + row) * Block::kRowChunks + slice;
    weights_place[step] = Now(base + p.room.data + Block::Permuted(chunk) * kChunkBytes);
    // So many rows of blocks have these depths.
    rows[step] = Now(static_cast<std::uint32_t>(p.in_features - part * kChunk + kBlock - 1) / kBlock);
  }
  const std::uint32_t order = Now(base + p.room.order), inner = Now(base + p.room.inner);
  WaitForCopies<0>();
  __syncthreads();

  const int begin = max(0, min(ptr_begin, p.nnz)), end = max(0, min(ptr_end, p.nnz));
  float sums[2][4] = {};  // of either half of a step: shorter chains
#pragma unroll 1
  for (int first = begin; first < end; first += Block::kEntries) {
    const int entry = first + lane / 8 / Block::kDepths;
    const std::uint32_t id = entry < end ? LoadShared4(order + entry * 4) : nnz;
    const std::uint32_t block_row = id < nnz ? LoadShared4(inner + id * 4) : ~0u;
#pragma unroll
    for (int step = 0; step < Block::kSteps; ++step) {
      const bool exists = block_row < rows[step];
      const std::uint32_t weights = weights_place[step] + id * (Block::kChunks * kChunkBytes);
      const std::uint32_t x = x_place + (block_row * Block::kRowChunks + step * Block::kDepths) * kChunkBytes;
      std::uint32_t low[4], high[4], b[4];  // tokens, eight more tokens, weights
      LoadMatrices<false>(low, exists ? x : base);
      LoadMatrices<false>(high, exists ? x + x_step : base);
      LoadMatrices<!kTranspose>(b, exists ? weights : base);
      MultiplyAdd<T>(sums[0], {low[0], high[0], low[1], high[1]}, b[0], b[1]);
      MultiplyAdd<T>(sums[1], {low[2], high[2], low[3], high[3]}, b[2], b[3]);
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) sums[0][i] += sums[1][i];
  if (p.is_plain) {
    if (feature >= p.out_features) return;
    T* const y =
        static_cast<T*>(p.y) + (first_token + lane / 4) * std::int64_t{p.out_features} + feature + lane % 4 * 2;
    if (lane / 4 < tokens) StorePair(y, sums[0][0], sums[0][1]);
    if (lane / 4 + 8 < tokens) StorePair(y + std::int64_t{8} * p.out_features, sums[0][2], sums[0][3]);
    return;
  }
  __syncthreads();  // all is read
  float* const room_of_sums = reinterpret_cast<float*>(shared) + thread / 32 * kSums;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    room_of_sums[(lane / 4 + i / 2 * 8) * kTileFeatures + lane % 4 * 2 + i % 2] = sums[0][i];
  }
  __syncwarp();
  if (lane >= tokens || feature >= p.out_features) return;
  float* const from = room_of_sums + lane * kTileFeatures;
  if (p.product.f32_output) {
    WriteResults<float>(p.product, p.epilogue, 0, first_token + lane, feature, from, 1, kWarps * kSums);
  } else {
    WriteResults<T>(p.product, p.epilogue, 0, first_token + lane, feature, from, 1, kWarps * kSums);
  }
}

std::int64_t SharedBytes(const TinyRoom& room) {
  constexpr std::int64_t kResults = 2 * kWarps * kSums * 4;  // sums and slopes
  return std::max<std::int64_t>(room.end, kResults);
}

template <typename T>
cudaError_t LaunchType(const TinyParams& params, cudaStream_t stream) {
  const MatmulParams& p = params.product;
  const dim3 grid(CeilDiv(p.out_features, kWarps * kTileFeatures), CeilDiv(p.tokens, kTileTokens));
  const auto launch = [&](auto kernel, auto transposed) {
    (p.transpose ? transposed : kernel)<<<grid, kTinyThreads, SharedBytes(params.room), stream>>>(params);
    return cudaGetLastError();
  };
  switch (p.block) {
    case 8:
      return launch(MatmulTinyKernel<T, false, 8>, MatmulTinyKernel<T, true, 8>);
    case 16:
      return launch(MatmulTinyKernel<T, false, 16>, MatmulTinyKernel<T, true, 16>);
    case 32:
      return launch(MatmulTinyKernel<T, false, 32>, MatmulTinyKernel<T, true, 32>);
    case 64:
      return launch(MatmulTinyKernel<T, false, 64>, MatmulTinyKernel<T, true, 64>);
    default:
      return launch(MatmulTinyKernel<T, false, 128>, MatmulTinyKernel<T, true, 128>);
  }
}

}  // namespace

bool CanLaunchMatmulTiny(const MatmulParams& p, const Epilogue& epilogue) {
  if (!CanLaunchMatmulSkinny(p) || p.batch != 1 || epilogue.column_sums != nullptr) return false;
  if (std::int64_t{p.nnz} * p.block * p.block * 2 > kMaxDataBytes || p.in_features > kTinySharedBytes) return false;
  return CeilDiv(p.out_features, kWarps * kTileFeatures) * CeilDiv(p.tokens, kTileTokens) <= kTinyMaxCtas &&
         SharedBytes(TinyRoom(TinyRows(p.in_features), p.nnz, p.block)) <= kTinySharedBytes;
}

cudaError_t LaunchMatmulTiny(const MatmulParams& p, const Epilogue& epilogue, cudaStream_t stream) {
  TinyParams params;
  params.data = p.data;
  params.order = p.order;
  params.inner = p.inner;
  params.ptr = p.ptr;
  params.x = p.x;
  params.y = p.y;
  params.nnz = p.nnz;
  params.out_features = p.out_features;
  params.in_features = p.in_features;
  params.tokens = static_cast<std::int32_t>(p.tokens);
  params.rows = TinyRows(p.in_features);
  params.room = TinyRoom(params.rows, p.nnz, p.block);
  params.is_plain = epilogue.IsIdentity() && !p.f32_output && p.out_features % kChunk == 0;
  params.product = p;
  params.epilogue = epilogue;
  return p.type == ElementType::kBF16 ? LaunchType<__nv_bfloat16>(params, stream) : LaunchType<__half>(params, stream);
}

}  // namespace jax_blocksparse
