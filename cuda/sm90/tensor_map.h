// Tensor maps: what a tensor copy (TMA) needs to know about an array in global memory. Made on the host for each
// launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_blocksparse::sm90 {

// The driver's encoder, looked up at run time so that nothing links to libcuda; null if the driver has none.
inline decltype(&cuTensorMapEncodeTiled) TensorMapEncoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(ok ? function : nullptr);
  }();
  return encoder;
}

// An array (batch, rows, row_elements), row-major and dense, that is copied in boxes of box_rows rows of 64 or 128
// bytes, which shared memory holds with the swizzle over as many. The array starts, and its rows follow each other, at
// multiples of 16 bytes.
struct TensorMapSpec {
  const void* array;
  CUtensorMapDataType type;
  std::uint32_t element_bytes;
  std::uint64_t row_elements, rows, batch;
  std::uint32_t box_rows;
  std::uint32_t box_row_bytes = 128;
  // Whether L2 reads 256 bytes of a row from memory where 128 are asked for. Without it, nothing is read that may be
  // wanted much later or never.
  bool neighbours_follow = false;
};

inline cudaError_t EncodeTensorMap(CUtensorMap* map, const TensorMapSpec& spec) {
  const auto encode = TensorMapEncoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const std::uint64_t sizes[] = {spec.row_elements, spec.rows, spec.batch};
  const std::uint64_t pitch = spec.row_elements * spec.element_bytes;
  const std::uint64_t strides[] = {pitch, pitch * spec.rows};
  const std::uint32_t box[] = {spec.box_row_bytes / spec.element_bytes, spec.box_rows, 1};
  const std::uint32_t element_strides[] = {1, 1, 1};
  const CUtensorMapSwizzle swizzle = spec.box_row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUtensorMapL2promotion promotion =
      spec.neighbours_follow ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const CUresult result = encode(map, spec.type, 3, const_cast<void*>(spec.array), sizes, strides, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_blocksparse::sm90
