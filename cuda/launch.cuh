// Starts a kernel that takes one parameter struct.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>

namespace jax_blocksparse {

// Kernels may use more than 48 KB of shared memory only after asking for it, once a device. The answer is remembered
// without a lock: asking twice does no harm.
template <auto kKernel>
cudaError_t AllowSharedMemory(int bytes) {
  static std::atomic<std::uint64_t> allowed_devices{0};
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if (allowed_devices.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed_devices.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <auto kKernel, typename Params>
cudaError_t Launch(const Params& params, std::int64_t ctas, int threads, int shared_bytes, cudaStream_t stream) {
  if (ctas > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 0) {
    if (const cudaError_t error = AllowSharedMemory<kKernel>(shared_bytes); error != cudaSuccess) return error;
  }
  kKernel<<<static_cast<unsigned>(ctas), threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_blocksparse
