// Element types of the kernels. Arithmetic is done in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace neq::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16(value);
}

template <class N>
__host__ __device__ __forceinline__ N smaller(N a, N b) {
  return a < b ? a : b;
}

// The widest access to memory.
constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

// Elements that are neighbours in memory, read and written together.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<8> {
  using Type = uint2;
};
template <>
struct BitsOf<16> {
  using Type = uint4;
};

template <class T, int kCount>
struct Neighbours {
  using Bits = typename BitsOf<kCount* static_cast<int>(sizeof(T))>::Type;
  Bits bits;

  static __device__ __forceinline__ Neighbours load(const T* from) {
    return {*reinterpret_cast<const Bits*>(from)};
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Bits*>(to) = bits; }
  __device__ __forceinline__ T& operator[](int i) { return reinterpret_cast<T*>(&bits)[i]; }
};

template <class T>
using Vector = Neighbours<T, kVector<T>>;

}  // namespace neq::cuda
