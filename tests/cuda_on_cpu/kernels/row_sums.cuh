// Sums in float without tensor cores: shuffles, votes, and exchange inside a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/ptx.cuh"

namespace example {

constexpr int kRowsPerBlock = 4;  // one warp each

// Of the rows of x (rows, columns): `sums` in float, `rounded` as a pair (half, bfloat16) of bits,
// the sum of everything in `total`, and how many rows have a sum above zero in `positive`. Columns
// are a multiple of 4.
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    row_sums(const float* __restrict__ x, float* sums, uint2* rounded, float* total,
             unsigned* positive, int rows, int columns) {
  auto* const halves = reinterpret_cast<float (*)[2]>(neq::ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.x * kRowsPerBlock + warp;
  const bool inside = row < rows;
  float sum = 0;
  for (int column = 4 * lane; inside && column < columns; column += 128) {
    const float4 values =
        __ldg(reinterpret_cast<const float4*>(x + int64_t{row} * columns + column));
    sum += values.x + values.y + values.z + values.w;
  }
  // Sixteen lanes each, then both halves through shared memory.
  const unsigned half_warp = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int distance = 8; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(half_warp, sum, distance, 16);
  }
  if (lane % 16 == 0) halves[warp][lane / 16] = sum;
  __syncwarp();
  sum = halves[warp][0] + halves[warp][1];
  const unsigned votes = __ballot_sync(0xffffffffu, inside && lane == 0 && sum > 0);
  if (inside && lane == 0) {
    sums[row] = sum;
    const __half2 as_half = __floats2half2_rn(sum, 0);
    const __nv_bfloat162 as_bfloat16 = __floats2bfloat162_rn(sum, 0);
    rounded[row] = make_uint2(__half_as_ushort(__low2half(as_half)),
                              __bfloat16_as_ushort(__low2bfloat16(as_bfloat16)));
    atomicAdd(total, sum);
    if (votes != 0) atomicAdd(positive, 1u);
  }
}

// to = from, 16 bytes at a time; lanes in reverse order.
__global__ void copy_16(const float* from, float* to, int n_chunks) {
  const int first = blockIdx.x * blockDim.x + threadIdx.x / 32 * 32;
  const int lane = __shfl_xor_sync(0xffffffffu, int(threadIdx.x % 32), 31);
  const int chunk = first + __shfl_sync(0xffffffffu, lane, threadIdx.x % 32);
  if (chunk < n_chunks) {
    neq::ptx::store_16(to + 4 * chunk, neq::ptx::load_16_streaming(from + 4 * chunk));
  }
}

}  // namespace example
