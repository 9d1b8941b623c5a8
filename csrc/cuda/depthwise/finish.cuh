// The second pass: parts become the gradient.
#pragma once

#include "../common/ptx.cuh"
#include "common.cuh"

namespace neq::cuda {

// `grad` is [k, taps].
template <class T>
struct DepthwiseFinish {
  const float* parts;
  const float* bias_parts;
  const int64_t* order;
  const int32_t* count;
  T* grad;
  T* bias;
  int64_t k;
  int taps, number_of_parts, most;
};

// Adds the parts, each warp of a block some of them; frozen neurons become 0.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_finish_kernel(DepthwiseFinish<T> f) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  const int64_t i = index / f.taps;
  const int tap = static_cast<int>(index % f.taps);
  const bool exists = index < f.k * f.taps, adds_bias = exists && f.bias != nullptr && tap == 0;
  float sum = 0, bias = 0;
  if (exists && i < *f.count) {
#pragma unroll 8
    for (int64_t part = warp; part < f.number_of_parts; part += kDepthwiseWarps) {
      sum += f.parts[(part * f.most + i) * f.taps + tap];
    }
    for (int64_t part = warp; adds_bias && part < f.number_of_parts; part += kDepthwiseWarps) {
      bias += f.bias_parts[part * f.most + i];
    }
  }
  auto* const of_warps = reinterpret_cast<float2*>(ptx::dynamic_shared());
  of_warps[threadIdx.x] = make_float2(sum, bias);
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int other = 1; other < kDepthwiseWarps; ++other) {
    sum += of_warps[other * kLanes + lane].x;
    bias += of_warps[other * kLanes + lane].y;
  }
  const int64_t neuron = f.order[i];
  f.grad[neuron * f.taps + tap] = from_float<T>(sum);
  if (adds_bias) f.bias[neuron] = from_float<T>(bias);
}

}  // namespace neq::cuda
