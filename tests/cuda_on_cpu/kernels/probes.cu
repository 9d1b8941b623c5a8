// Kernels of a few lines, each for one rule of the emulator.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "common/ptx.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class... Parameters, class... Given>
cudaError_t start(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes,
                  Given... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

__device__ int* shared_ints() { return reinterpret_cast<int*>(neq::ptx::dynamic_shared()); }

// --- what a launch brings along ------------------------------------------------------------------

struct Scale {
  float factors[5];
  int64_t offset;
};

__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = 1000 * block + thread;
}

__global__ void constants(float* out, Scale scale, int shift) {
  static constexpr float kTable[4] = {10, 20, 30, 40};
  out[threadIdx.x] = kTable[(threadIdx.x + shift) % 4] + scale.factors[threadIdx.x % 5] +
                     static_cast<float>(scale.offset);
}

// --- warps ---------------------------------------------------------------------------------------

// Both halves of a warp at once, each in its own branch.
__global__ void two_branches(int* out) {
  const int lane = threadIdx.x;
  int value;
  if (lane < 16) {
    value = __shfl_xor_sync(0x0000ffffu, lane, 1);
    value += static_cast<int>(__ballot_sync(0x0000ffffu, lane % 4 == 0) >> 8);
  } else {
    value = __shfl_sync(0xffff0000u, lane, 16);
    value += static_cast<int>(__ballot_sync(0xffff0000u, lane % 2 == 0) >> 8);
  }
  out[lane] = value;
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kAll, lane, lane + 5);
  out[32 + lane] = __shfl_xor_sync(kAll, lane, 9);
  out[64 + lane] = __shfl_down_sync(kAll, lane, 3);
  out[96 + lane] = __shfl_sync(kAll, lane, 2, 8);
  out[128 + lane] = __shfl_xor_sync(kAll, lane, 8, 8);
  out[160 + lane] = __shfl_down_sync(kAll, lane, 3, 4);
}

// Neighbours exchange through shared memory, ordered by `__syncwarp` of the lanes in `mask`.
__global__ void exchange(int* out, unsigned mask, bool shuffle_too) {
  const int lane = threadIdx.x;
  if ((mask >> lane & 1u) == 0) return;
  int* const cells = shared_ints();
  cells[lane] = lane;
  if (shuffle_too) __shfl_sync(mask, lane, lane);
  __syncwarp(mask);
  out[lane] = cells[lane ^ 1];
}

__global__ void shuffle_from_outside(int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) out[lane] = __shfl_sync(0x0000ffffu, lane, 20);
}

__global__ void diverged(int* out) {
  const int lane = threadIdx.x % 32;
  if (lane < 8) {
    out[lane] = __shfl_sync(kAll, lane, 0);
  } else {
    __syncthreads();
  }
}

__global__ void endless(int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_sync(0x0001ffffu, lane, 0);
  } else {
    out[lane] = __shfl_sync(0xffff8000u, lane, 16);
  }
}

// --- blocks --------------------------------------------------------------------------------------

// The second warp ends before the barrier: who remains meets there.
__global__ void early_end(int* out) {
  if (threadIdx.x >= 32) return;
  shared_ints()[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared_ints()[31 - threadIdx.x];
}

__global__ void histogram(const int* values, int* out, bool with_barrier) {
  if (threadIdx.x < 4) shared_ints()[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&shared_ints()[values[threadIdx.x] % 4], 1);
  if (with_barrier) __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = shared_ints()[threadIdx.x];
}

// --- grids ---------------------------------------------------------------------------------------

enum Fences { kBeforeBarrier, kAfterBarrier, kNoFirst, kNoSecond, kReaderFences };

// The last block adds what the others left; who fences where is chosen.
__global__ void last_adds(int* parts, int* ticket, int* out, int fences) {
  parts[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
  if (fences != kAfterBarrier && fences != kNoFirst) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fences == kAfterBarrier) __threadfence();
    *shared_ints() = atomicAdd(ticket, 1);
    if (fences != kNoSecond && fences != kReaderFences) __threadfence();
  }
  __syncthreads();
  if (*shared_ints() != static_cast<int>(gridDim.x) - 1) return;
  if (fences == kReaderFences) __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * blockDim.x + threadIdx.x];
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *ticket = 0;
}

// The same with a warp for a block.
__global__ void last_warp_adds(int* parts, int* ticket, int* out, bool synced) {
  const int lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int n_warps = gridDim.x * blockDim.x / 32;
  parts[warp * 32 + lane] = lane;
  if (synced) __syncwarp();
  int drawn = 0;
  if (lane == 0) {
    __threadfence();
    drawn = atomicAdd(ticket, 1);
    __threadfence();
  }
  drawn = __shfl_sync(kAll, drawn, 0);
  __syncwarp();
  if (drawn != n_warps - 1) return;
  int sum = 0;
  for (int w = 0; w < n_warps; ++w) sum += parts[w * 32 + lane];
  out[lane] = sum;
}

// Every block reads all of x, and writes its own part of it.
__global__ void read_and_write(int* x, int* out) {
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += x[i * 32 + threadIdx.x];
  out[blockIdx.x * 32 + threadIdx.x] = sum;
  if (blockIdx.x == gridDim.x - 1) x[threadIdx.x] = sum;
}

// --- memory --------------------------------------------------------------------------------------

enum Access { kRead, kWrite, kNull, kStack, kSet, kCopy, kReadOnly };

__global__ void touch(const int* x, int* out, int how, int at, int64_t count) {
  int** const pointers = reinterpret_cast<int**>(neq::ptx::dynamic_shared());
  int local[4] = {1, 2, 3, 4};
  if (how == kRead) out[threadIdx.x] = x[at];
  if (how == kWrite) const_cast<int*>(x)[at] = 1;
  if (how == kNull) *static_cast<volatile int*>(nullptr) = 1;
  if (how == kStack) {
    if (threadIdx.x == 0) *pointers = local;
    __syncthreads();
    out[threadIdx.x] = (*pointers)[at];
  }
  if (how == kReadOnly) {
    out[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = __ldg(out + threadIdx.x);
  }
  if (how == kSet) memset(out + at, 0, count);
  if (how == kCopy) memcpy(out + at, x, count);
}

// Between its start and the wait, nobody may touch the target of a copy.
__global__ void touch_copy(const float* x, float* out, int groups_left) {
  float* const cells = reinterpret_cast<float*>(neq::ptx::dynamic_shared());
  neq::ptx::cp_async_16(cells + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  neq::ptx::cp_async_commit();
  neq::ptx::cp_async_16(cells + 4 * (32 + threadIdx.x), x, false);
  neq::ptx::cp_async_commit();
  if (groups_left == 0) neq::ptx::cp_async_wait<0>();
  if (groups_left == 1) neq::ptx::cp_async_wait<1>();
  out[threadIdx.x] = cells[4 * threadIdx.x + 1];
  if (groups_left == 0) out[threadIdx.x] += cells[4 * (32 + threadIdx.x)];
}

// What a copy does not read becomes zeros.
__global__ void copy_some(const float* x, float* out, int bytes) {
  float* const cells = reinterpret_cast<float*>(neq::ptx::dynamic_shared());
  neq::ptx::cp_async_up_to_16(cells + 4 * threadIdx.x, x + 4 * threadIdx.x, bytes);
  neq::ptx::cp_async_commit();
  neq::ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = cells[4 * threadIdx.x + i];
}

// --- requests ------------------------------------------------------------------------------------

template <class T>
__global__ void load(const T* x, float* out, int stride, int offset, int times) {
  float sum = 0;
  for (int i = 0; i < times; ++i) {
    sum += static_cast<float>(x[(i * 32 + threadIdx.x) * stride + offset]);
  }
  out[threadIdx.x] = sum;
}

__global__ void load_vectors(const float* x, float* out, int how) {
  const float* const from = x + 4 * threadIdx.x;
  float4 values;
  if (how == 0) values = *reinterpret_cast<const float4*>(from);
  if (how == 1) values = __ldg(reinterpret_cast<const float4*>(from));
  if (how == 2) {
    const uint4 bits = neq::ptx::load_16(from);
    memcpy(static_cast<void*>(&values), &bits, sizeof(bits));
  }
  if (how == 3) {
    const float2 low = *reinterpret_cast<const float2*>(from);
    values = make_float4(low.x, low.y, 0, 0);
  }
  *reinterpret_cast<float2*>(out + 2 * threadIdx.x) = make_float2(values.x, values.y);
}

// Lanes skip rounds, each its own number of them; all meet after each.
__global__ void load_in_turns(const float* x, float* out) {
  float sum = 0;
  for (unsigned round = 0; round < 4; ++round) {
    if (threadIdx.x / 8 >= round) sum += x[round * 32 + threadIdx.x];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}

__global__ void add_all(float* sums, int stride) { atomicAdd(sums + threadIdx.x * stride, 1.0f); }

}  // namespace

extern "C" {

cudaError_t run_indices(int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2, 3, 2);
  config.blockDim = dim3(4, 2, 3);
  return cudaLaunchKernelEx(&config, indices, out);
}
cudaError_t run_constants(float* out) {
  return start(constants, 1, 32, 0, out, Scale{{1, 2, 3, 4, 5}, 1000}, 1);
}
cudaError_t run_two_branches(int* out) { return start(two_branches, 1, 32, 0, out); }
cudaError_t run_shuffles(int* out) { return start(shuffles, 1, 32, 0, out); }
cudaError_t run_exchange(int* out, unsigned mask, int shuffle_too) {
  return start(exchange, 1, 32, 128, out, mask, shuffle_too != 0);
}
cudaError_t run_shuffle_from_outside(int* out) {
  return start(shuffle_from_outside, 1, 32, 0, out);
}
cudaError_t run_diverged(int* out) { return start(diverged, 1, 64, 0, out); }
cudaError_t run_endless(int* out) { return start(endless, 1, 32, 0, out); }
cudaError_t run_early_end(int* out) { return start(early_end, 1, 64, 128, out); }
cudaError_t run_histogram(const int* values, int* out, int with_barrier) {
  return start(histogram, 1, 64, 16, values, out, with_barrier != 0);
}
cudaError_t run_last_adds(int* parts, int* ticket, int* out, int blocks, int fences) {
  return start(last_adds, blocks, 64, 4, parts, ticket, out, fences);
}
cudaError_t run_last_warp_adds(int* parts, int* ticket, int* out, int blocks, int synced) {
  return start(last_warp_adds, blocks, 64, 0, parts, ticket, out, synced != 0);
}
cudaError_t run_read_and_write(int* x, int* out, int blocks) {
  return start(read_and_write, blocks, 32, 0, x, out);
}
cudaError_t run_touch(const int* x, int* out, int how, int at, int64_t count) {
  return start(touch, 1, 32, 8, x, out, how, at, count);
}
cudaError_t run_copy_some(const float* x, float* out, int bytes) {
  return start(copy_some, 1, 2, 1024, x, out, bytes);
}

cudaError_t run_touch_copy(const float* x, float* out, int groups_left) {
  return start(touch_copy, 1, 32, 1024, x, out, groups_left);
}
cudaError_t run_load(const float* x, float* out, int stride, int offset, int times) {
  return start(load<float>, 1, 32, 0, x, out, stride, offset, times);
}
cudaError_t run_load_half(const __half* x, float* out, int stride, int offset, int times) {
  return start(load<__half>, 1, 32, 0, x, out, stride, offset, times);
}
cudaError_t run_load_vectors(const float* x, float* out, int how) {
  return start(load_vectors, 1, 32, 0, x, out, how);
}
cudaError_t run_load_in_turns(const float* x, float* out) {
  return start(load_in_turns, 1, 32, 0, x, out);
}
cudaError_t run_add_all(float* sums, int stride) { return start(add_all, 1, 32, 0, sums, stride); }

cudaError_t run_launch(int* out, int blocks, int threads, int shared_bytes, int allowed) {
  if (allowed > 0) {
    cudaFuncSetAttribute(early_end, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
  }
  return start(early_end, blocks, threads, shared_bytes, out);
}
// Whether the launcher looks at errors or not, they are reported.
cudaError_t run_unseen(int* out) {
  start(early_end, 0, 64, 128, out);
  cudaGetLastError();
  return cudaSuccess;
}
cudaError_t run_set(int* address, int64_t bytes) { return cudaMemsetAsync(address, 1, bytes); }
int device_attribute(int attribute) {
  int device, value = -1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), device);
  return value;
}

// --- conversions ---------------------------------------------------------------------------------

void half_to_float(const __half* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __half2float(from[i]);
}
void bfloat16_to_float(const __nv_bfloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __bfloat162float(from[i]);
}
void float_to_half(const float* from, __half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __float2half_rn(from[i]);
}
void float_to_bfloat16(const float* from, __nv_bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = __float2bfloat16_rn(from[i]);
}

}  // extern "C"
