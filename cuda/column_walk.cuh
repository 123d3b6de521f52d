// Walks the lists of several output blocks at once, in the order of the blocks they are multiplied with.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels.h"

namespace jax_blocksparse {

// Merges the lists of kColumns neighbouring output blocks ("columns") by inner block ("row"), so that a piece of x
// that several columns need is loaded once. Every warp runs its own copy, and all copies agree.
//
// The 32 lanes hold a window of 32 / kColumns entries of each column, the following window, and the ids of the one
// after that: order[i] and inner[order[i]] are two dependent loads, and each is issued one window before it is needed.
//
// Nothing is assumed about the lists: entries with an id or a row out of range are passed over, and a list that is
// not sorted, or names a row twice, costs extra steps only.
template <int kColumns>
class ColumnWalk {
  static constexpr int kWindow = 32 / kColumns;
  static_assert(kColumns * kWindow == 32);
  static constexpr unsigned kAllLanes = 0xffffffffu;

 public:
  static constexpr int kEnd = INT_MAX;

  struct Step {
    int row;                // kEnd when all lists are used up
    std::uint32_t columns;  // bit c: column c has a block in this row
    int id;                 // in lane c, the id of column c's block
  };

  __device__ ColumnWalk(const MatmulParams& params, std::int64_t batch, std::int64_t first_column)
      : order_(params.order + batch * params.order_batch_stride),
        inner_(params.inner + batch * params.order_batch_stride),
        nnz_(params.nnz),
        rows_(static_cast<int>(CeilDiv(params.in_features, params.block))),
        lane_(threadIdx.x % 32) {
    const std::int64_t column = first_column + lane_ / kWindow;
    if (column * params.block < params.out_features) {
      const std::int32_t* ptr = params.ptr + batch * params.ptr_batch_stride + column;
      index_ = max(0, min(__ldg(ptr), nnz_));
      end_ = max(0, min(__ldg(ptr + 1), nnz_));
    }
    index_ += lane_ % kWindow;
    for (int i = 0; i < 3; ++i) Refill();
  }

  __device__ Step Next() {
    Step step;
    do {
      const bool is_head = lane_ % kWindow == head_;
      step.row = __reduce_min_sync(kAllLanes, is_head ? row_ : kEnd);
      const unsigned taken = __ballot_sync(kAllLanes, is_head && row_ == step.row && row_ != kEnd);
      // Lanes below kColumns report for the column of their number; all lanes advance their own column.
      const unsigned reported = taken >> (lane_ % kColumns * kWindow) & kWindowMask;
      step.columns = __ballot_sync(kAllLanes, lane_ < kColumns && reported != 0);
      step.id = __shfl_sync(kAllLanes, id_, lane_ % kColumns * kWindow + max(0, __ffs(reported) - 1));
      const unsigned own = taken >> (lane_ / kWindow * kWindow) & kWindowMask;
      if (own != 0 && ++head_ == kWindow) Refill();
    } while (step.row < 0);
    return step;
  }

 private:
  static constexpr unsigned kWindowMask = kAllLanes >> (32 - kWindow);
  static constexpr int kSkip = -1;       // an id or a row that is out of range
  static constexpr int kNoId = INT_MIN;  // behind the end of the list

  __device__ int RowOf(int id) const {
    if (id == kNoId) return kEnd;
    if (id < 0 || id >= nnz_) return kSkip;
    const int row = __ldg(inner_ + id);
    return row >= 0 && row < rows_ ? row : kSkip;
  }

  // Three calls fill the pipeline: ids two windows ahead, rows one window ahead.
  __device__ void Refill() {
    id_ = next_id_;
    row_ = next_row_;
    next_id_ = far_id_;
    next_row_ = RowOf(far_id_);
    far_id_ = index_ < end_ ? max(__ldg(order_ + index_), kSkip) : kNoId;
    index_ += kWindow;
    head_ = 0;
  }

  const std::int32_t* order_;
  const std::int32_t* inner_;
  int nnz_;
  int rows_;
  int lane_;
  std::uint32_t index_ = 0;  // unsigned: may pass the end, and so 2^31, by three windows
  std::uint32_t end_ = 0;
  int head_ = 0;  // first entry of the window that is not used up
  int id_ = kNoId, row_ = kEnd;
  int next_id_ = kNoId, next_row_ = kEnd;
  int far_id_ = kNoId;
};

}  // namespace jax_blocksparse
