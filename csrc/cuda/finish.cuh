// The second pass of every weight gradient: parts of the active rows are added, in order, into the
// whole gradient, and the rows of frozen neurons become 0.
#pragma once

#include "elements.cuh"

namespace neq::cuda {

constexpr int kFinishThreads = 256, kFinishColumns = 4;

// `parts` is From[parts, most, taps, c] and `bias_parts` From[bias parts, most] or null, of which
// the first `count` of `most` neurons hold something. A neuron's weights lie one after the other:
// `grad` is [k, taps * c], where column c of tap r is element r * tap_stride + c * c_stride. c is a
// multiple of 4.
template <class From, class T>
struct Finish {
  const From* parts;
  const From* bias_parts;
  const int64_t* order;
  const int32_t* count;
  T* grad;
  T* bias;
  int64_t k, c, c_stride, tap_stride;
  int number_of_parts, number_of_bias_parts, most, taps;
};

template <class T>
using Columns = Neighbours<T, kFinishColumns>;

template <class From, class T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Finish<From, T> f) {
  const int64_t row_size = f.c * f.taps, groups = row_size / kFinishColumns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (index >= f.k * groups) return;
  const int64_t i = index / groups, at = index % groups * kFinishColumns;
  const int64_t neuron = f.order[i];
  const bool is_active = i < *f.count;
  float sums[kFinishColumns] = {};
  float bias = 0;
  if (is_active) {
    for (int part = 0; part < f.number_of_parts; ++part) {
      const int64_t slot = static_cast<int64_t>(part) * f.most + i;
      auto columns = Columns<From>::load(f.parts + slot * row_size + at);
#pragma unroll
      for (int j = 0; j < kFinishColumns; ++j) sums[j] += to_float(columns[j]);
    }
    if (f.bias_parts != nullptr && at == 0) {
      for (int part = 0; part < f.number_of_bias_parts; ++part) {
        bias += to_float(f.bias_parts[static_cast<int64_t>(part) * f.most + i]);
      }
    }
  }
  const int64_t tap = at / f.c, column = at % f.c;
  T* to = f.grad + neuron * row_size + tap * f.tap_stride + column * f.c_stride;
  if (f.c_stride == 1) {
    Columns<T> columns;
#pragma unroll
    for (int j = 0; j < kFinishColumns; ++j) columns[j] = from_float<T>(sums[j]);
    columns.store(to);
  } else {
#pragma unroll
    for (int j = 0; j < kFinishColumns; ++j) to[j * f.c_stride] = from_float<T>(sums[j]);
  }
  if (f.bias != nullptr && at == 0) f.bias[neuron] = from_float<T>(bias);
}

}  // namespace neq::cuda
