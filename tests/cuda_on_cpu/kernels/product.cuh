// A tiled product of 16-bit matrices that uses what the project's kernels use: asynchronous copies
// in stages, matrix fragments, tensor cores, and a split reduction that the last block adds up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/ptx.cuh"

namespace example {

constexpr int kTile = 64, kDepth = 32, kThreads = 128, kWarps = kThreads / 32;
constexpr int kChunk = 8;  // elements of a copy
constexpr int kPadding = 8;

// kRows: the operands are (m, k) and (n, k), and (k, m) and (k, n) otherwise.
template <class T, bool kRows, int kStages>
struct Shared {
  static constexpr int kOuter = kRows ? kTile : kDepth, kInner = kRows ? kDepth : kTile;
  T a[kStages][kOuter][kInner + kPadding];
  T b[kStages][kOuter][kInner + kPadding];
  int is_last;
};

// Starts the copy of a tile of a row-major matrix, with zeros outside of it.
template <class T, int kOuter, int kInner>
__device__ __forceinline__ void copy_tile(T (&tile)[kOuter][kInner + kPadding], const T* matrix,
                                          int first_row, int first_column, int rows, int columns) {
  constexpr int kChunksPerRow = kInner / kChunk;
  for (int i = threadIdx.x; i < kOuter * kChunksPerRow; i += kThreads) {
    const int row = i / kChunksPerRow, column = i % kChunksPerRow * kChunk;
    const bool inside = first_row + row < rows && first_column + column < columns;
    const int64_t offset = int64_t{first_row + row} * columns + first_column + column;
    neq::ptx::cp_async_16(&tile[row][column], matrix + (inside ? offset : 0), inside);
  }
}

// out[m, n] = sum over k of a and b, float. Every split of the reduction leaves its part in
// `parts`; the last one to finish a tile adds them in order. `tickets` are zero, and are zero again
// afterwards. m, n and k are multiples of 8.
template <class T, bool kRows, int kStages>
__global__ void __launch_bounds__(kThreads)
    product(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, float* parts,
            int* tickets, int m, int n, int k) {
  using Tiles = Shared<T, kRows, kStages>;
  constexpr int kOuter = Tiles::kOuter, kInner = Tiles::kInner;
  Tiles& tiles = *reinterpret_cast<Tiles*>(neq::ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const int n_steps = (k + kDepth - 1) / kDepth;
  const int first = n_steps * blockIdx.z / gridDim.z, last = n_steps * (blockIdx.z + 1) / gridDim.z;

  const auto copy_step = [&](int step) {
    if (step < last) {
      const int stage = (step - first) % kStages, k0 = step * kDepth;
      copy_tile<T, kOuter, kInner>(tiles.a[stage], a, kRows ? m0 : k0, kRows ? k0 : m0,
                                   kRows ? m : k, kRows ? k : m);
      copy_tile<T, kOuter, kInner>(tiles.b[stage], b, kRows ? n0 : k0, kRows ? k0 : n0,
                                   kRows ? n : k, kRows ? k : n);
    }
    neq::ptx::cp_async_commit();
  };

  float sums[2][4][4] = {};
  for (int step = first; step < first + kStages - 1; ++step) copy_step(step);
  for (int step = first; step < last; ++step) {
    copy_step(step + kStages - 1);
    neq::ptx::cp_async_wait<kStages - 1>();
    __syncthreads();  // the stage is there
    const int stage = (step - first) % kStages;
    for (int k0 = 0; k0 < kDepth; k0 += 16) {
      uint32_t fragments_a[2][4], fragments_b[4][2];
      for (int i = 0; i < 2; ++i) {
        const int mi = warp_m + 16 * i;
        if constexpr (kRows) {
          neq::ptx::ldmatrix_x4(fragments_a[i],
                                &tiles.a[stage][mi + lane % 16][k0 + lane / 16 * 8]);
        } else {
          neq::ptx::ldmatrix_x4_trans(
              fragments_a[i],
              &tiles.a[stage][k0 + lane / 16 * 8 + lane % 8][mi + lane / 8 % 2 * 8]);
        }
      }
      for (int j = 0; j < 4; ++j) {
        const int nj = warp_n + 8 * j;
        if constexpr (kRows) {
          neq::ptx::ldmatrix_x2(fragments_b[j],
                                &tiles.b[stage][nj + lane % 8][k0 + lane / 8 % 2 * 8]);
        } else {
          neq::ptx::ldmatrix_x2_trans(fragments_b[j], &tiles.b[stage][k0 + lane % 16][nj]);
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          neq::ptx::mma_16816<T>(sums[i][j], fragments_a[i], fragments_b[j]);
        }
      }
    }
    __syncthreads();  // the stage is free
  }

  float* const part = gridDim.z == 1 ? out : parts + int64_t{m} * n * blockIdx.z;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = m0 + warp_m + 16 * i + lane / 4, column = n0 + warp_n + 8 * j + lane % 4 * 2;
      if (column >= n) continue;
      float* const to = part + int64_t{row} * n + column;
      if (row < m) {
        *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
      }
      if (row + 8 < m) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(sums[i][j][2], sums[i][j][3]);
      }
    }
  }
  if (gridDim.z == 1) return;

  __threadfence();  // the part is written before the ticket is drawn
  __syncthreads();
  int* const ticket = tickets + blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) tiles.is_last = atomicAdd(ticket, 1) == int(gridDim.z) - 1;
  __threadfence();  // the ticket is drawn before parts are read
  __syncthreads();
  if (!tiles.is_last) return;
  for (int i = threadIdx.x; i < kTile * kTile / 4; i += kThreads) {
    const int row = m0 + i / (kTile / 4), column = n0 + i % (kTile / 4) * 4;
    if (row >= m || column >= n) continue;
    const int64_t offset = int64_t{row} * n + column;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int split = 0; split < int(gridDim.z); ++split) {
      const float4 more = *reinterpret_cast<const float4*>(parts + int64_t{m} * n * split + offset);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    *reinterpret_cast<float4*>(out + offset) = sum;
  }
  if (threadIdx.x == 0) *ticket = 0;
}

}  // namespace example
