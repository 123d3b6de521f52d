// The XLA custom calls: cut a product into tasks and run them on XLA's thread pool.
#include "handlers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "decode.h"
#include "products.h"
#include "thread_pool.h"

namespace jax_blocksparse {
namespace {

namespace ffi = xla::ffi;

// A task should be worth the few microseconds it takes to hand it out, and there should be enough of them to even out
// their unequal sizes.
constexpr int64_t kMinTaskFlops = int64_t{1} << 20;
constexpr int64_t kTasksPerThread = 8;

void* thread_scratch() {
  alignas(64) thread_local std::byte scratch[kScratchBytes];
  return scratch;
}

// How many of `items` equal items of `flops` each one task should take, where `others` says by how many further ways
// the work is divided.
int64_t items_per_task(int64_t items, int64_t flops, int64_t others, int64_t threads) {
  const int64_t for_size = CeilDiv(kMinTaskFlops, std::max<int64_t>(flops, 1));
  const int64_t for_balance = CeilDiv(items * others, kTasksPerThread * std::max<int64_t>(threads, 1));
  return std::clamp<int64_t>(std::max(for_size, for_balance), 1, std::max<int64_t>(items, 1));
}

ffi::Error Matmul(ffi::ThreadPool pool, bool transpose, ffi::AnyBuffer x, ffi::AnyBuffer data, Indices ptr,
                  Indices order, Indices inner, ffi::Result<ffi::AnyBuffer> y) {
  const auto decoded = DecodeMatmul(x, data, ptr, order, inner, *y, transpose);
  if (decoded.has_error()) return decoded.error();
  const MatmulParams& params = *decoded;
  if (y->element_count() == 0) return ffi::Error::Success();

  const int64_t columns = CeilDiv(params.out_features, params.block);
  const int64_t row_tiles = CeilDiv(params.tokens, max_rows_per_task(params.block));
  const int64_t rows = CeilDiv(params.tokens, row_tiles);
  // Reading a block costs about as much as multiplying it by a few rows.
  const int64_t column_flops = 2 * (rows + 4) * params.block * params.block * CeilDiv(params.nnz, columns);
  const int64_t columns_per_task = items_per_task(columns, column_flops, params.batch * row_tiles, pool.num_threads());
  const int64_t column_tiles = CeilDiv(columns, columns_per_task);

  const MatmulFn run = selected_kernels().matmul[static_cast<int>(params.type)][params.f32_output];
  parallel_for(pool, params.batch * row_tiles * column_tiles, [&](int64_t i) {
    MatmulTask task;
    task.g = i / (row_tiles * column_tiles);
    task.row = i / column_tiles % row_tiles * rows;
    task.rows = std::min(rows, params.tokens - task.row);
    task.column = i % column_tiles * columns_per_task;
    task.columns = std::min(columns_per_task, columns - task.column);
    if (task.rows > 0) run(params, task, thread_scratch());
  });
  return ffi::Error::Success();
}

ffi::Error Sddmm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, Indices rows, Indices cols,
                 ffi::Result<ffi::AnyBuffer> data) {
  const auto decoded = DecodeSddmm(x, dy, rows, cols, *data);
  if (decoded.has_error()) return decoded.error();
  const SddmmParams& params = *decoded;
  if (data->element_count() == 0) return ffi::Error::Success();

  const int64_t block_flops = 2 * (params.tokens + 4) * params.block * params.block;
  const int64_t ids_per_task = std::min(items_per_task(params.nnz, block_flops, params.batch, pool.num_threads()),
                                        max_ids_per_task(params.block));
  const int64_t tiles = CeilDiv(params.nnz, ids_per_task);

  const SddmmFn run = selected_kernels().sddmm[static_cast<int>(params.type)][params.f32_output];
  parallel_for(pool, params.batch * tiles, [&](int64_t i) {
    SddmmTask task;
    task.g = i / tiles;
    task.id = i % tiles * ids_per_task;
    task.ids = std::min<int64_t>(ids_per_task, params.nnz - task.id);
    run(params, task, thread_scratch());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_blocksparse

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_blocksparse_matmul_cpu, jax_blocksparse::Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("transpose")
                                  .Arg<xla::ffi::AnyBuffer>()       // x
                                  .Arg<xla::ffi::AnyBuffer>()       // data
                                  .Arg<jax_blocksparse::Indices>()  // ptr
                                  .Arg<jax_blocksparse::Indices>()  // order
                                  .Arg<jax_blocksparse::Indices>()  // inner
                                  .Ret<xla::ffi::AnyBuffer>());     // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_blocksparse_sddmm_cpu, jax_blocksparse::Sddmm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()       // x
                                  .Arg<xla::ffi::AnyBuffer>()       // dy
                                  .Arg<jax_blocksparse::Indices>()  // rows
                                  .Arg<jax_blocksparse::Indices>()  // cols
                                  .Ret<xla::ffi::AnyBuffer>());     // data
