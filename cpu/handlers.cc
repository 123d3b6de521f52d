// Checks the operands, cuts a product into tasks and runs them on XLA's thread pool.
#include "handlers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "checks.h"
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `items` equal items of `flops` each one task should take, where `others` says by how many further ways
// the work is divided.
int64_t items_per_task(int64_t items, int64_t flops, int64_t others, int64_t threads) {
  const int64_t for_size = ceil_div(kMinTaskFlops, std::max<int64_t>(flops, 1));
  const int64_t for_balance = ceil_div(items * others, kTasksPerThread * std::max<int64_t>(threads, 1));
  return std::clamp<int64_t>(std::max(for_size, for_balance), 1, std::max<int64_t>(items, 1));
}

// Finds the kernel's place in KernelTable, or says what is wrong with the types.
struct Types {
  Types(Checks& checks, const char* result_name, ffi::DataType operand, ffi::DataType result) {
    const auto found = dtype_of(operand);
    if (!found) {
      checks.fail("x has an element type other than f32, f64, bf16 and f16");
      return;
    }
    const bool is_16_bit = *found == DType::kBF16 || *found == DType::kF16;
    if (result != operand && !(is_16_bit && result == ffi::DataType::F32)) {
      checks.fail(std::string(result_name) + " must have the element type of x, or be f32 where that is a 16-bit type");
    }
    index = static_cast<int>(*found);
    widened = result != operand;
  }

  int index = 0;
  bool widened = false;
};

ffi::Error Matmul(ffi::ThreadPool pool, bool transpose, ffi::AnyBuffer x, ffi::AnyBuffer data, ffi::AnyBuffer ptr,
                  ffi::AnyBuffer order, ffi::AnyBuffer inner, ffi::Result<ffi::AnyBuffer> y) {
  Checks checks("jax_blocksparse.matmul");
  checks.rank("x", x, 3);
  checks.rank("data", data, 4);
  checks.rank("ptr", ptr, 2);
  checks.rank("order", order, 2);
  checks.rank("inner", inner, 2);
  checks.rank("y", *y, 3);
  if (checks.failed()) return checks.error();

  const auto x_dims = x.dimensions(), data_dims = data.dimensions(), y_dims = y->dimensions();
  const int64_t batch = y_dims[0], patterns = ptr.dimensions()[0];
  MatmulArgs args{};
  args.M = x_dims[1];
  args.C = x_dims[2];
  args.O = y_dims[2];
  args.nnz = data_dims[1];
  checks.block_size(data_dims[2], data_dims[3]);
  if (checks.failed()) return checks.error();
  args.block = static_cast<int>(data_dims[2]);
  const int64_t columns = blocks_along(args.O, args.block);
  checks.batch("x", x_dims[0], batch);
  checks.batch("data", data_dims[0], batch);
  checks.batch("ptr", patterns, batch);
  checks.shape("ptr", ptr, {patterns, columns + 1});
  checks.shape("order", order, {patterns, args.nnz});
  checks.shape("inner", inner, {patterns, args.nnz});
  checks.shape("y", *y, {batch, args.M, args.O});
  checks.type("data", data, x.element_type());
  checks.type("ptr", ptr, ffi::DataType::S32);
  checks.type("order", order, ffi::DataType::S32);
  checks.type("inner", inner, ffi::DataType::S32);
  const Types types(checks, "y", x.element_type(), y->element_type());
  if (checks.failed()) return checks.error();

  args.x = x.untyped_data();
  args.data = data.untyped_data();
  args.ptr = static_cast<const int32_t*>(ptr.untyped_data());
  args.order = static_cast<const int32_t*>(order.untyped_data());
  args.inner = static_cast<const int32_t*>(inner.untyped_data());
  args.y = y->untyped_data();
  args.x_stride = x_dims[0] == 1 ? 0 : args.M * args.C;
  args.data_stride = data_dims[0] == 1 ? 0 : args.nnz * args.block * args.block;
  args.ptr_stride = patterns == 1 ? 0 : columns + 1;
  args.pattern_stride = patterns == 1 ? 0 : args.nnz;
  args.transpose = transpose;

  const int64_t row_tiles = ceil_div(args.M, max_rows_per_task(args.block));
  if (row_tiles == 0 || columns == 0 || batch == 0) return ffi::Error::Success();
  // Reading a block costs about as much as multiplying it by a few rows.
  const int64_t rows = ceil_div(args.M, row_tiles);
  const int64_t column_flops = 2 * (rows + 4) * args.block * args.block * ceil_div(args.nnz, columns);
  const int64_t columns_per_task = items_per_task(columns, column_flops, batch * row_tiles, pool.num_threads());
  const int64_t column_tiles = ceil_div(columns, columns_per_task);

  const MatmulFn run = selected_kernels().matmul[types.index][types.widened];
  parallel_for(pool, batch * row_tiles * column_tiles, [&](int64_t i) {
    MatmulTask task;
    task.g = i / (row_tiles * column_tiles);
    task.row = i / column_tiles % row_tiles * rows;
    task.rows = std::min(rows, args.M - task.row);
    task.column = i % column_tiles * columns_per_task;
    task.columns = std::min(columns_per_task, columns - task.column);
    if (task.rows > 0) run(args, task, thread_scratch());
  });
  return ffi::Error::Success();
}

ffi::Error Sddmm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer rows, ffi::AnyBuffer cols,
                 ffi::Result<ffi::AnyBuffer> data) {
  Checks checks("jax_blocksparse.sddmm");
  checks.rank("x", x, 3);
  checks.rank("dy", dy, 3);
  checks.rank("rows", rows, 2);
  checks.rank("cols", cols, 2);
  checks.rank("data", *data, 4);
  if (checks.failed()) return checks.error();

  const auto x_dims = x.dimensions(), dy_dims = dy.dimensions(), data_dims = data->dimensions();
  const int64_t batch = data_dims[0], patterns = rows.dimensions()[0];
  SddmmArgs args{};
  args.M = x_dims[1];
  args.K = x_dims[2];
  args.N = dy_dims[2];
  args.nnz = data_dims[1];
  checks.block_size(data_dims[2], data_dims[3]);
  checks.batch("x", x_dims[0], batch);
  checks.batch("dy", dy_dims[0], batch);
  checks.batch("rows", patterns, batch);
  checks.shape("dy", dy, {dy_dims[0], args.M, args.N});
  checks.shape("rows", rows, {patterns, args.nnz});
  checks.shape("cols", cols, {patterns, args.nnz});
  checks.type("dy", dy, x.element_type());
  checks.type("rows", rows, ffi::DataType::S32);
  checks.type("cols", cols, ffi::DataType::S32);
  const Types types(checks, "data", x.element_type(), data->element_type());
  if (checks.failed()) return checks.error();

  args.block = static_cast<int>(data_dims[2]);
  args.x = x.untyped_data();
  args.dy = dy.untyped_data();
  args.rows = static_cast<const int32_t*>(rows.untyped_data());
  args.cols = static_cast<const int32_t*>(cols.untyped_data());
  args.data = data->untyped_data();
  args.x_stride = x_dims[0] == 1 ? 0 : args.M * args.K;
  args.dy_stride = dy_dims[0] == 1 ? 0 : args.M * args.N;
  args.pattern_stride = patterns == 1 ? 0 : args.nnz;

  if (args.nnz == 0 || batch == 0) return ffi::Error::Success();
  const int64_t block_flops = 2 * (args.M + 4) * args.block * args.block;
  const int64_t ids_per_task =
      std::min(items_per_task(args.nnz, block_flops, batch, pool.num_threads()), max_ids_per_task(args.block));
  const int64_t tiles = ceil_div(args.nnz, ids_per_task);

  const SddmmFn run = selected_kernels().sddmm[types.index][types.widened];
  parallel_for(pool, batch * tiles, [&](int64_t i) {
    SddmmTask task;
    task.g = i / tiles;
    task.id = i % tiles * ids_per_task;
    task.ids = std::min(ids_per_task, args.nnz - task.id);
    run(args, task, thread_scratch());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_blocksparse

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_blocksparse_matmul_cpu, jax_blocksparse::Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<bool>("transpose")
                                  .Arg<xla::ffi::AnyBuffer>()    // x
                                  .Arg<xla::ffi::AnyBuffer>()    // data
                                  .Arg<xla::ffi::AnyBuffer>()    // ptr
                                  .Arg<xla::ffi::AnyBuffer>()    // order
                                  .Arg<xla::ffi::AnyBuffer>()    // inner
                                  .Ret<xla::ffi::AnyBuffer>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_blocksparse_sddmm_cpu, jax_blocksparse::Sddmm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()    // x
                                  .Arg<xla::ffi::AnyBuffer>()    // dy
                                  .Arg<xla::ffi::AnyBuffer>()    // rows
                                  .Arg<xla::ffi::AnyBuffer>()    // cols
                                  .Ret<xla::ffi::AnyBuffer>());  // data
