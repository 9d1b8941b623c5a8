// Weight and bias gradients of the active channels of a depthwise convolution, in parts:
//
//   sums[i, r, s] = sum over n, p, q of dY[n, order[i], p, q] *
//                   X[n, order[i] / per_input, p * stride + r - padding, q * stride + s - padding]
//
// A thread has one neuron and all of its taps, and goes down the rows of an image: each row of X is
// multiplied with the rows of dY that its taps reach, which are still in registers. Where channels
// lie innermost (strips), neighbouring threads have neighbouring neurons and each a few columns;
// where pixels do (planes), they have neighbouring columns of what was copied to shared memory. A
// third kernel, of a few taps at a time, takes any kernel size, dilation and strides.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "slots.cuh"
#include "stretch.cuh"

namespace neq::cuda {

constexpr int kDepthwiseThreads = 128, kDepthwiseWarps = kDepthwiseThreads / kLanes;

// In elements.
struct ImageStrides {
  int64_t image, channel, line, column;
};

// `parts` is float[parts, most, taps], `bias_parts` float[parts, most] or null, of whose `most`
// neurons the first `count` are written.
template <class T>
struct Depthwise {
  const T* dy;
  const T* x;
  ImageStrides dy_strides, x_strides;
  const int64_t* order;
  const int32_t* count;
  float* parts;
  float* bias_parts;
  int images, height, width, out_height, out_width, kernel_height, kernel_width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int per_input, most;
  int across;           // neurons of a block, a power of 2: thread i has neuron i % across
  int rows, bands;      // output rows of a band, and bands of an image
  int columns;          // of a row, beside each other: strips, or threads
  int together;         // bands in shared memory
  int units, per_part;  // of work: of a block's part units are taken in turns
};

// The share of one part.
struct UnitsOfPart {
  template <class T>
  __device__ __forceinline__ explicit UnitsOfPart(const Depthwise<T>& d)
      : first(static_cast<int>(
            smaller<int64_t>(static_cast<int64_t>(blockIdx.y) * d.per_part, d.units))),
        end(static_cast<int>(smaller<int64_t>(first + static_cast<int64_t>(d.per_part), d.units))) {
  }

  int first, end;
};

// How taps of a square kernel go together with rows: an input row is read by every kStride-th tap,
// which are kDepth at most.
template <class T_, int kSide_, int kStride_>
struct Taps {
  using T = T_;
  static constexpr int kSide = kSide_, kStride = kStride_, kNumber = kSide * kSide;
  static constexpr int kDepth = (kSide + kStride - 1) / kStride;
  // A strip's columns of dY, and those of X that they reach.
  static constexpr int kOutputs = 8 / kStride, kInputs = (kOutputs - 1) * kStride + kSide;
  // Blocks on a multiprocessor: as many as there are registers for.
  static constexpr int kStripBlocks = kSide == 7 ? 2 : kSide + kStride == 4 ? 4 : 3;
  static constexpr int kPlaneBlocks = kSide == 3 ? 8 : kSide == 5 ? 6 : 4;

  // Input rows or columns that so many output ones reach.
  static __device__ __forceinline__ int reach(int outputs) {
    return (outputs - 1) * kStride + kSide;
  }
};

template <int kSums>
constexpr int kSumsShared =
    kDepthwiseWarps * kSums * (kLanes + 1) * static_cast<int>(sizeof(float));

// Adds the sums of all threads of a neuron, and calls `write(neuron, j, sum)` for each of them.
template <int kSums, class Write>
__device__ __forceinline__ void add_threads(float (&sums)[kSums], int across, int neurons,
                                            unsigned char* shared, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  for (int lanes = kLanes / 2; lanes >= across; lanes /= 2) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], lanes);
  }
  auto* const of_warps = reinterpret_cast<float*>(shared);
  const int pitch = across + 1;
  if (lane < across) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) of_warps[(warp * kSums + j) * pitch + lane] = sums[j];
  }
  __syncthreads();
  for (int i = thread; i < neurons * kSums; i += kDepthwiseThreads) {
    const int neuron = i / kSums, j = i % kSums;
    float sum = 0;
    for (int other = 0; other < kDepthwiseWarps; ++other) {
      sum += of_warps[(other * kSums + j) * pitch + neuron];
    }
    write(neuron, j, sum);
  }
}

// The same for all taps and, as the last sum, the bias.
template <int kSums, class T>
__device__ __forceinline__ void write_part(const Depthwise<T>& d, float (&sums)[kSums], int first,
                                           int neurons, unsigned char* shared) {
  add_threads(sums, d.across, neurons, shared, [&](int neuron, int j, float sum) {
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * d.most + first + neuron;
    if (j < kSums - 1) {
      d.parts[slot * (kSums - 1) + j] = sum;
    } else if (d.bias_parts != nullptr) {
      d.bias_parts[slot] = sum;
    }
  });
}

// A step down: `dy` holds rows of dY, the latest first, and `x` is the input row `down` (of
// kStride) below the one that the first tap of the latest one reads.
template <class Taps, int kOutputs, int kInputs>
__device__ __forceinline__ void multiply_row(float (&sums)[Taps::kNumber + 1],
                                             const float (&dy)[Taps::kDepth][kOutputs],
                                             const float (&x)[kInputs], int down) {
#pragma unroll
  for (int i = 0; i < Taps::kDepth; ++i) {
    const int r = down + i * Taps::kStride;
    if (r >= Taps::kSide) break;
#pragma unroll
    for (int s = 0; s < Taps::kSide; ++s) {
#pragma unroll
      for (int q = 0; q < kOutputs; ++q) {
        sums[r * Taps::kSide + s] += dy[i][q] * x[q * Taps::kStride + s];
      }
    }
  }
}

// --- channels innermost --------------------------------------------------------------------------

// Blocks: x for neurons, y for parts. Units are strips of bands of images.
template <class Taps>
__global__ void __launch_bounds__(kDepthwiseThreads, Taps::kStripBlocks)
    depthwise_strips_kernel(Depthwise<typename Taps::T> d) {
  using T = typename Taps::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * d.across;
  const int neurons = smaller(smaller(*d.count, d.most) - first, d.across);
  if (neurons <= 0) return;
  const bool exists = thread % d.across < neurons;
  const int neuron = exists ? static_cast<int>(d.order[first + thread % d.across]) : 0;
  const T* const all_dy = d.dy + neuron * d.dy_strides.channel;
  const T* const all_x = d.x + neuron / d.per_input * d.x_strides.channel;
  const auto dy_step = static_cast<int>(d.dy_strides.column);
  const auto x_step = static_cast<int>(d.x_strides.column);
  const UnitsOfPart units(d);

  float sums[Taps::kNumber + 1] = {};
  const int workers = kDepthwiseThreads / d.across;
  for (int unit = units.first + thread / d.across; exists && unit < units.end; unit += workers) {
    const int strip = unit % d.columns, band = unit / d.columns % d.bands;
    const int64_t image = unit / d.columns / d.bands;
    const int p = band * d.rows, q = strip * Taps::kOutputs;
    const int rows = smaller(d.rows, d.out_height - p);
    const int outputs = smaller(Taps::kOutputs, d.out_width - q);
    const int h = p * Taps::kStride - d.padding_h, w = q * Taps::kStride - d.padding_w;
    // A bit for each of the columns that exist.
    const unsigned dy_columns = (1u << outputs) - 1;
    unsigned x_columns = 0;
#pragma unroll
    for (int i = 0; i < Taps::kInputs; ++i) {
      const bool take = i < Taps::reach(outputs) && w + i >= 0 && w + i < d.width;
      x_columns |= static_cast<unsigned>(take) << i;
    }
    const T* next_dy =
        all_dy + image * d.dy_strides.image + p * d.dy_strides.line + q * d.dy_strides.column;
    const T* next_x =
        all_x + image * d.x_strides.image + h * d.x_strides.line + w * d.x_strides.column;

    // What a step multiplies is loaded a step ahead.
    T loaded_dy[Taps::kOutputs], loaded_x[Taps::kStride][Taps::kInputs];
    const auto load = [&](int step) {
      const unsigned taken = step < rows ? dy_columns : 0;
#pragma unroll
      for (int i = 0; i < Taps::kOutputs; ++i) {
        const bool take = (taken >> i & 1) != 0;
        loaded_dy[i] = take ? next_dy[i * dy_step] : from_float<T>(0);
      }
      next_dy += d.dy_strides.line;
#pragma unroll
      for (int down = 0; down < Taps::kStride; ++down) {
        const int row = step * Taps::kStride + down;
        const bool is_row = row < Taps::reach(rows) && h + row >= 0 && h + row < d.height;
        const unsigned taken = is_row ? x_columns : 0;
#pragma unroll
        for (int i = 0; i < Taps::kInputs; ++i) {
          const bool take = (taken >> i & 1) != 0;
          loaded_x[down][i] = take ? next_x[i * x_step] : from_float<T>(0);
        }
        next_x += d.x_strides.line;
      }
    };
    load(0);
    float dy[Taps::kDepth][Taps::kOutputs] = {};
    const int steps = rows + Taps::kDepth - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int i = Taps::kDepth - 1; i > 0; --i) {
#pragma unroll
        for (int j = 0; j < Taps::kOutputs; ++j) dy[i][j] = dy[i - 1][j];
      }
#pragma unroll
      for (int j = 0; j < Taps::kOutputs; ++j) {
        dy[0][j] = to_float(loaded_dy[j]);
        sums[Taps::kNumber] += dy[0][j];
      }
      float x[Taps::kStride][Taps::kInputs];
#pragma unroll
      for (int down = 0; down < Taps::kStride; ++down) {
#pragma unroll
        for (int i = 0; i < Taps::kInputs; ++i) x[down][i] = to_float(loaded_x[down][i]);
      }
      load(step + 1);
#pragma unroll
      for (int down = 0; down < Taps::kStride; ++down) {
        multiply_row<Taps>(sums, dy, x[down], down);
      }
    }
  }
  write_part(d, sums, first, neurons, ptx::dynamic_shared());
}

// --- pixels innermost ----------------------------------------------------------------------------

// A band of one channel of an image; rows of X outside of the image are left out.
template <class Taps>
struct Band {
  using T = typename Taps::T;

  __device__ __forceinline__ Band(const Depthwise<T>& d, int neuron, int unit) {
    const int64_t image = unit / d.bands;
    const int p = unit % d.bands * d.rows;
    rows = smaller(d.rows, d.out_height - p);
    const int h = p * Taps::kStride - d.padding_h, end = h + Taps::reach(rows);
    const int top = h < 0 ? 0 : h, bottom = smaller(end, d.height);
    above = top - h;
    x_rows = bottom > top ? bottom - top : 0;
    dy = {d.dy + image * d.dy_strides.image + neuron * d.dy_strides.channel +
              static_cast<int64_t>(p) * d.out_width,
          rows * d.out_width};
    x = {d.x + image * d.x_strides.image + neuron / d.per_input * d.x_strides.channel +
             static_cast<int64_t>(top) * d.width,
         x_rows * d.width};
  }

  Stretch<T> dy, x;
  int rows, x_rows, above;
};

// Blocks: x for neurons, y for parts. Units are bands of images, of which some lie in shared memory
// together. Rows lie one after the other.
template <class Taps>
__global__ void __launch_bounds__(kDepthwiseThreads, Taps::kPlaneBlocks)
    depthwise_planes_kernel(Depthwise<typename Taps::T> d) {
  using T = typename Taps::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x);
  if (first >= smaller(*d.count, d.most)) return;
  const auto neuron = static_cast<int>(d.order[first]);
  const UnitsOfPart units(d);
  const int dy_vectors = Stretch<T>::most_vectors(d.rows * d.out_width);
  const int x_vectors = Stretch<T>::most_vectors(smaller(Taps::reach(d.rows), d.height) * d.width);
  auto* const shared_dy = reinterpret_cast<T*>(ptx::dynamic_shared());
  T* const shared_x = shared_dy + d.together * dy_vectors * kVector<T>;

  float sums[Taps::kNumber + 1] = {};
  for (int unit = units.first; unit < units.end; unit += d.together) {
    const int bands = smaller(d.together, units.end - unit);
    for (int i = thread; i < bands * dy_vectors; i += kDepthwiseThreads) {
      const Band<Taps> band(d, neuron, unit + i / dy_vectors);
      band.dy.copy(shared_dy + i / dy_vectors * dy_vectors * kVector<T>, i % dy_vectors);
    }
    for (int i = thread; i < bands * x_vectors; i += kDepthwiseThreads) {
      const Band<Taps> band(d, neuron, unit + i / x_vectors);
      band.x.copy(shared_x + i / x_vectors * x_vectors * kVector<T>, i % x_vectors);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int i = thread; i < bands * d.out_width; i += kDepthwiseThreads) {
      const int number = i / d.out_width, q = i % d.out_width;
      const Band<Taps> band(d, neuron, unit + number);
      const T* const dy_column = shared_dy + number * dy_vectors * kVector<T> + band.dy.shift() + q;
      const int w = q * Taps::kStride - d.padding_w;
      const T* const x_columns = shared_x + number * x_vectors * kVector<T> + band.x.shift() + w;
      float dy[Taps::kDepth][1] = {};
      const int steps = band.rows + Taps::kDepth - 1;
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int j = Taps::kDepth - 1; j > 0; --j) dy[j][0] = dy[j - 1][0];
        dy[0][0] = step < band.rows ? to_float(dy_column[step * d.out_width]) : 0.0f;
        sums[Taps::kNumber] += dy[0][0];
#pragma unroll
        for (int down = 0; down < Taps::kStride; ++down) {
          const int row = step * Taps::kStride + down - band.above;
          const bool is_row = row >= 0 && row < band.x_rows;
          float x[Taps::kSide];
#pragma unroll
          for (int s = 0; s < Taps::kSide; ++s) {
            const bool take = is_row && w + s >= 0 && w + s < d.width;
            x[s] = take ? to_float(x_columns[row * d.width + s]) : 0.0f;
          }
          multiply_row<Taps>(sums, dy, x, down);
        }
      }
    }
    __syncthreads();
  }
  write_part(d, sums, first, 1, ptx::dynamic_shared());
}

// --- anything else -------------------------------------------------------------------------------

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

// --- second pass ---------------------------------------------------------------------------------

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

// Adds the parts, in order; frozen neurons become 0.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_finish_kernel(DepthwiseFinish<T> f) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (index >= f.k * f.taps) return;
  const int64_t i = index / f.taps, neuron = f.order[i];
  const int tap = static_cast<int>(index % f.taps);
  const bool adds_bias = f.bias != nullptr && tap == 0;
  float sum = 0, bias = 0;
  if (i < *f.count) {
    for (int64_t part = 0; part < f.number_of_parts; ++part) {
      sum += f.parts[(part * f.most + i) * f.taps + tap];
    }
    for (int64_t part = 0; adds_bias && part < f.number_of_parts; ++part) {
      bias += f.bias_parts[part * f.most + i];
    }
  }
  f.grad[neuron * f.taps + tap] = from_float<T>(sum);
  if (adds_bias) f.bias[neuron] = from_float<T>(bias);
}

}  // namespace neq::cuda
