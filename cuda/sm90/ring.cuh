// Stages in shared memory that producers fill and consumers empty, in turns.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace jax_blocksparse::sm90 {

constexpr unsigned kAllLanes = 0xffffffffu;

// Its barriers are 2 * kMaxStages of 8 bytes: full ones, then empty ones. It may use fewer stages.
template <int kMaxStages>
class StageRing {
 public:
  __device__ StageRing(std::uint32_t barriers, int stages) : barriers_(barriers), stages_(stages) {}

  // Every producer arrives for every stage, also if it has nothing to copy: else it could fall behind unnoticed.
  static __device__ void Init(std::uint32_t barriers, int stages, int producers, int consumers) {
    for (int stage = 0; stage < stages; ++stage) {
      InitBarrier(barriers + stage * 8, producers);
      InitBarrier(barriers + (kMaxStages + stage) * 8, consumers);
    }
    FenceBarrierInit();
  }

  __device__ int stage() const { return stage_; }
  __device__ std::uint32_t full() const { return barriers_ + stage_ * 8; }
  __device__ std::uint32_t empty() const { return full() + kMaxStages * 8; }
  // Whether it is full for all lanes of the warp, which must be converged.
  __device__ bool IsFull() const { return __all_sync(kAllLanes, TestBarrier(full(), phase_)); }
  __device__ void WaitFull() const { WaitBarrier(full(), phase_); }
  __device__ void WaitEmpty() const { WaitBarrier(empty(), phase_ ^ 1); }
  __device__ void Advance() {
    if (++stage_ == stages_) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }
  // Passes by stages that others wait for.
  __device__ void Skip(int count) {
    stage_ += count;
    phase_ ^= static_cast<std::uint32_t>(stage_ / stages_) & 1;
    stage_ %= stages_;
  }

 private:
  std::uint32_t barriers_;
  int stages_;
  int stage_ = 0;
  std::uint32_t phase_ = 0;
};

}  // namespace jax_blocksparse::sm90
