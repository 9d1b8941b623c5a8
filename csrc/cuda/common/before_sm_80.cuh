// What GPUs of compute capability 7.5 do where newer ones have an instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace neq::ptx::before_sm_80 {

// At once, not in the background.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool take) {
  *static_cast<uint4*>(shared) = take ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void copy_up_to_16(void* shared, const void* global, int bytes) {
  if (bytes == 16) return copy_16(shared, global, true);
  auto* const to = static_cast<uint16_t*>(shared);
  const auto* const from = static_cast<const uint16_t*>(global);
  for (int i = 0; i < 8; ++i) to[i] = 2 * i < bytes ? from[i] : uint16_t{0};
}

__device__ __forceinline__ float2 to_floats(uint32_t pair, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

__device__ __forceinline__ float2 to_floats(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// ptx::mma_16816 by the lanes themselves. Two rows at a time, a lane gets its row of a from the
// four lanes that share it, and its columns of b from the lanes of their groups.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, column = lane % 4 * 2;
#pragma unroll 1  // the callers have unrolled enough
  for (int i = 0; i < 8; ++i) {
    const int within = i % 4;
    float2 rows[2], columns[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t row = __shfl_sync(0xffffffffu, i < 4 ? a[j] : a[2 + j], group * 4 + within);
      const uint32_t other =
          __shfl_sync(0xffffffffu, i < 4 ? b[0] : b[1], (column + j) * 4 + within);
      rows[j] = to_floats(row, T{});
      columns[j] = to_floats(other, T{});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 row = rows[j / 2], other = columns[j % 2];
      d[j] += row.x * other.x + row.y * other.y;
    }
  }
}

}  // namespace neq::ptx::before_sm_80
