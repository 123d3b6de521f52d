// What depends on the type of the factors: 16 bits, or float, of which the tensor cores see as much as TF32 has.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace jax_blocksparse::sm90 {

// Of a row in shared memory: the swizzle, the descriptors and the tensor maps are for these.
constexpr int kRowBytes = 128;
// Of such a row, the part that one product takes, whatever the type: its depth.
constexpr int kDepthBytes = 32;

template <typename T>
constexpr int kRowElements = kRowBytes / int{sizeof(T)};
template <typename T>
constexpr int kDepth = kDepthBytes / int{sizeof(T)};

// For tensor copies into shared memory, which round floats to TF32 on the way: products would cut them off.
template <typename T>
constexpr CUtensorMapDataType kFactorMapType = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
                                               : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

}  // namespace jax_blocksparse::sm90
