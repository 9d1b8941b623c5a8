// Any kernel size, dilation and strides.
#pragma once

#include "../common/ptx.cuh"
#include "common.cuh"

namespace neq::cuda {

constexpr int kSomeTaps = 8;

// Blocks: x for neurons, y for parts, z for taps. Units are output rows; `columns` threads share
// one.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4) depthwise_any_kernel(Depthwise<T> d) {
  const int thread = static_cast<int>(threadIdx.x), worker = thread / d.across;
  const int first = static_cast<int>(blockIdx.x) * d.across;
  const int neurons = smaller(smaller(*d.count, d.most) - first, d.across);
  if (neurons <= 0) return;
  const bool exists = thread % d.across < neurons;
  const int neuron = exists ? static_cast<int>(d.order[first + thread % d.across]) : 0;
  const T* const all_dy = d.dy + neuron * d.dy_strides.channel;
  const T* const all_x = d.x + neuron / d.per_input * d.x_strides.channel;
  const int taps = d.kernel_height * d.kernel_width;
  const int first_tap = static_cast<int>(blockIdx.z) * kSomeTaps;
  const UnitsOfPart units(d);

  float sums[kSomeTaps + 1] = {};
  const int workers = kDepthwiseThreads / d.across / d.columns;
  for (int unit = units.first + worker / d.columns; exists && unit < units.end; unit += workers) {
    const int64_t image = unit / d.out_height;
    const int p = unit % d.out_height;
    const T* const dy = all_dy + image * d.dy_strides.image + p * d.dy_strides.line;
    const T* const x = all_x + image * d.x_strides.image;
    for (int q = worker % d.columns; q < d.out_width; q += d.columns) {
      const float grad = to_float(dy[q * d.dy_strides.column]);
      sums[kSomeTaps] += grad;
#pragma unroll
      for (int i = 0; i < kSomeTaps; ++i) {
        const int tap = first_tap + i;
        const int h = p * d.stride_h - d.padding_h + tap / d.kernel_width * d.dilation_h;
        const int w = q * d.stride_w - d.padding_w + tap % d.kernel_width * d.dilation_w;
        if (tap >= taps || h < 0 || h >= d.height || w < 0 || w >= d.width) continue;
        sums[i] += grad * to_float(x[h * d.x_strides.line + w * d.x_strides.column]);
      }
    }
  }
  add_threads(sums, d.across, neurons, ptx::dynamic_shared(), [&](int i, int j, float sum) {
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * d.most + first + i;
    const int tap = first_tap + j;
    if (j == kSomeTaps) {
      if (first_tap == 0 && d.bias_parts != nullptr) d.bias_parts[slot] = sum;
    } else if (tap < taps) {
      d.parts[slot * taps + tap] = sum;
    }
  });
}

}  // namespace neq::cuda
