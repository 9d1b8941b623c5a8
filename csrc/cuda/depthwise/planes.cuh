// Pixels lie innermost: neighbouring threads have neighbouring columns of one neuron.
#pragma once

#include "../common/ptx.cuh"
#include "../common/stretch.cuh"
#include "common.cuh"

namespace neq::cuda {

// A band of one channel of an image; rows of X outside of the image are left out.
template <class Taps>
struct Band {
  using T = typename Taps::T;

  __device__ __forceinline__ Band(const Depthwise<T>& d, int neuron, int unit) {
    // Most images are bands of their own.
    const int image = d.bands == 1 ? unit : unit / d.bands;
    const int p = (unit - image * d.bands) * d.rows;
    rows = smaller(d.rows, d.out_height - p);
    const int h = p * Taps::kStride - d.padding_h, end = h + Taps::reach(rows);
    const int top = h < 0 ? 0 : h, bottom = smaller(end, d.height);
    above = top - h;
    x_rows = bottom > top ? bottom - top : 0;
    dy = {d.dy,
          d.dy + image * d.dy_strides.image + neuron * d.dy_strides.channel +
              static_cast<int64_t>(p) * d.out_width,
          rows * d.out_width};
    x = {d.x,
         d.x + image * d.x_strides.image + neuron / d.per_input * d.x_strides.channel +
             static_cast<int64_t>(top) * d.width,
         x_rows * d.width};
  }

  Stretch<T> dy, x;
  int rows, x_rows, above;
};

// Calls `copy(i, vector)` for every vector of `bands` bands, by all threads.
template <class Copy>
__device__ __forceinline__ void copy_bands(int bands, int vectors, const Copy& copy) {
  const int thread = static_cast<int>(threadIdx.x);
  int band = thread / vectors, vector = thread % vectors;
  while (band < bands) {
    copy(band, vector);
    band += kDepthwiseThreads / vectors;
    vector += kDepthwiseThreads % vectors;
    if (vector >= vectors) vector -= vectors, ++band;
  }
}

constexpr int kPlaneStages = 2, kPlaneOutputs = 2;

// Blocks: x for neurons, y for parts. Units are bands of images, of which some lie in shared memory
// together while the next ones are copied. Rows lie one after the other. A thread has neighbouring
// columns of a band, or a piece of them.
template <class Taps>
__global__ void __launch_bounds__(kDepthwiseThreads, Taps::kPlaneBlocks)
    depthwise_planes_kernel(Depthwise<typename Taps::T> d) {
  using T = typename Taps::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x);
  // One thread reads for all which neuron it is.
  auto* const shared_neuron = reinterpret_cast<int*>(ptx::dynamic_shared());
  if (thread == 0) {
    const int64_t found = d.order[first];
    *shared_neuron = first < *d.count ? static_cast<int>(found) : -1;
  }
  __syncthreads();
  const int neuron = *shared_neuron;
  if (neuron < 0) return;
  const UnitsOfPart units(d);
  const int dy_vectors = Stretch<T>::most_vectors(d.rows * d.out_width);
  const int x_vectors = Stretch<T>::most_vectors(smaller(Taps::reach(d.rows), d.height) * d.width);
  // `turn` counts steps.
  const auto stage_dy = [&](int turn) {
    auto* const stages = reinterpret_cast<T*>(ptx::dynamic_shared()) + kVector<T>;
    return stages + turn % kPlaneStages * d.together * (dy_vectors + x_vectors) * kVector<T>;
  };
  const auto stage_x = [&](int turn) {
    return stage_dy(turn) + d.together * dy_vectors * kVector<T>;
  };
  const auto copy = [&](int turn) {
    const int unit = units.first + turn * d.together;
    const int bands = smaller(d.together, units.end - unit);
    copy_bands(bands, dy_vectors, [&](int i, int vector) {
      Band<Taps>(d, neuron, unit + i).dy.copy(stage_dy(turn) + i * dy_vectors * kVector<T>, vector);
    });
    copy_bands(bands, x_vectors, [&](int i, int vector) {
      Band<Taps>(d, neuron, unit + i).x.copy(stage_x(turn) + i * x_vectors * kVector<T>, vector);
    });
    ptx::cp_async_commit();
  };

  float sums[Taps::kNumber + 1] = {};
  const int across = (d.out_width + kPlaneOutputs - 1) / kPlaneOutputs;
  const int threads = across * d.pieces, piece_rows = (d.rows + d.pieces - 1) / d.pieces;
  copy(0);
  for (int turn = 0; turn * d.together < units.end - units.first; ++turn) {
    const int unit = units.first + turn * d.together;
    const int bands = smaller(d.together, units.end - unit);
    copy(turn + 1);
    ptx::cp_async_wait<kPlaneStages - 1>();
    __syncthreads();
    for (int i = thread; i < bands * threads; i += kDepthwiseThreads) {
      const int number = i / threads, piece = i % threads / across;
      const int q = i % across * kPlaneOutputs, outputs = smaller(kPlaneOutputs, d.out_width - q);
      const Band<Taps> band(d, neuron, unit + number);
      const int p = piece * piece_rows, rows = smaller(piece_rows, band.rows - p);
      const T* const dy_columns =
          stage_dy(turn) + number * dy_vectors * kVector<T> + band.dy.shift() + p * d.out_width + q;
      const int w = q * Taps::kStride - d.padding_w;
      const T* const x_columns =
          stage_x(turn) + number * x_vectors * kVector<T> + band.x.shift() + w;
      constexpr int kInputs = (kPlaneOutputs - 1) * Taps::kStride + Taps::kSide;
      const int begin = w < 0 ? -w : 0, end = smaller(Taps::reach(outputs), d.width - w);
      float dy[Taps::kDepth][kPlaneOutputs] = {};
      const int steps = rows > 0 ? rows + Taps::kDepth - 1 : 0;
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int j = Taps::kDepth - 1; j > 0; --j) {
#pragma unroll
          for (int o = 0; o < kPlaneOutputs; ++o) dy[j][o] = dy[j - 1][o];
        }
#pragma unroll
        for (int o = 0; o < kPlaneOutputs; ++o) {
          const bool take = step < rows && o < outputs;
          dy[0][o] = take ? to_float(dy_columns[step * d.out_width + o]) : 0.0f;
          sums[Taps::kNumber] += dy[0][o];
        }
#pragma unroll
        for (int down = 0; down < Taps::kStride; ++down) {
          const int row = (p + step) * Taps::kStride + down - band.above;
          const bool is_row = row >= 0 && row < band.x_rows;
          float x[kInputs];
#pragma unroll
          for (int c = 0; c < kInputs; ++c) {
            const bool take = is_row && c >= begin && c < end;
            x[c] = take ? to_float(x_columns[row * d.width + c]) : 0.0f;
          }
          multiply_row<Taps>(sums, dy, x, down);
        }
      }
    }
    __syncthreads();
  }
  write_part(d, sums, first, 1, ptx::dynamic_shared() + kVectorBytes);
}

}  // namespace neq::cuda
