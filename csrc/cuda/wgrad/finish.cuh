// The second pass of every weight gradient: parts of the active rows are added, in order, into the
// whole gradient, and the rows of frozen neurons become 0.
#pragma once

#include "../common/elements.cuh"
#include "../common/ptx.cuh"

namespace neq::cuda {

constexpr int kFinishThreads = 256, kFinishColumns = 4;

// `parts` is From[parts, most, taps, c] and `bias_parts` From[bias parts, most] or null, of which
// the first `count` of `most` neurons hold something. A neuron's weights, fewer than 2^31, lie one
// after the other: `grad` is [k, taps * c], where column c of tap r is element r * tap_stride +
// c * c_stride. c is a multiple of 4.
template <class From, class T>
struct Finish {
  const From* parts;
  const From* bias_parts;
  const int64_t* order;
  const int32_t* count;
  T* grad;
  T* bias;
  int64_t k, c_stride, tap_stride;
  int c, row_size, number_of_parts, number_of_bias_parts, most;
};

template <class T>
using Columns = Neighbours<T, kFinishColumns>;

// Of a block: which neurons its rows are, of which there is one for each thread at most, and the
// count.
constexpr int kFinishShared = kFinishThreads * static_cast<int>(sizeof(int64_t)) + kVectorBytes;

// Each thread takes one group of columns; those of all rows lie one after the other.
template <class From, class T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Finish<From, T> f) {
  const unsigned thread = threadIdx.x;
  const unsigned groups = static_cast<unsigned>(f.row_size) / kFinishColumns;
  const int64_t first_group = static_cast<int64_t>(blockIdx.x) * kFinishThreads;
  const int64_t first_row = first_group / groups;
  const auto before = static_cast<unsigned>(first_group - first_row * groups);
  // Read once for a block: read by each warp, these bytes would be many beside the gradient's.
  auto* neurons = reinterpret_cast<int64_t*>(ptx::dynamic_shared());
  auto* count = reinterpret_cast<int32_t*>(neurons + kFinishThreads);
  if (thread <= (before + kFinishThreads - 1) / groups && first_row + thread < f.k) {
    neurons[thread] = f.order[first_row + thread];
  }
  if (thread == 0) *count = *f.count;
  __syncthreads();

  const unsigned row = (before + thread) / groups;
  const int64_t i = first_row + row;
  if (i >= f.k) return;
  const int at = static_cast<int>(before + thread - row * groups) * kFinishColumns;
  const int64_t neuron = neurons[row];
  const bool is_active = i < *count;
  float sums[kFinishColumns] = {};
  float bias = 0;
  if (is_active) {
    for (int part = 0; part < f.number_of_parts; ++part) {
      const int64_t slot = static_cast<int64_t>(part) * f.most + i;
      auto columns = Columns<From>::load(f.parts + slot * f.row_size + at);
#pragma unroll
      for (int j = 0; j < kFinishColumns; ++j) sums[j] += to_float(columns[j]);
    }
    if (f.bias_parts != nullptr && at == 0) {
      for (int part = 0; part < f.number_of_bias_parts; ++part) {
        bias += to_float(f.bias_parts[static_cast<int64_t>(part) * f.most + i]);
      }
    }
  }
  const int tap = at / f.c, column = at - tap * f.c;
  T* to = f.grad + neuron * f.row_size + tap * f.tap_stride + column * f.c_stride;
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
