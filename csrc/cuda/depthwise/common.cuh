// What the kernels for depthwise convolutions share. They compute weight and bias gradients of the
// active channels, in parts:
//
//   sums[i, r, s] = sum over n, p, q of dY[n, order[i], p, q] *
//                   X[n, order[i] / per_input, p * stride + r - padding, q * stride + s - padding]
//
// In rows.cuh and planes.cuh a thread has one neuron and all of its taps, and goes down the rows of
// an image: each row of X is multiplied with the rows of dY that its taps reach, which are still in
// registers. All rows are copied to shared memory first. any_kernel.cuh takes any kernel size,
// dilation and strides, a few taps at a time. finish.cuh adds the parts.
#pragma once

#include "../common/elements.cuh"
#include "../common/slots.cuh"

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
  int across;            // neurons of a block, or about as many where channels lie innermost
  int rows, bands;       // output rows of a band, and bands of an image
  int columns;           // of depthwise_any_kernel: threads that share a row
  int together, pieces;  // of planes: bands in shared memory, and pieces of each
  int units, per_part;   // of work: of a block's part units are taken in turns
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
  static constexpr int kOutputs = kSide == 7 ? 4 : 8 / kStride,
                       kInputs = (kOutputs - 1) * kStride + kSide;
  // Of channels innermost: a stage has room for one strip of as many neurons as there are lanes,
  // each in a vector of its own.
  static constexpr int kCopies =
      (kLanes * (kOutputs + kStride * kInputs) + kDepthwiseThreads - 1) / kDepthwiseThreads;
  static constexpr int kStageVectors = kCopies * kDepthwiseThreads;
  static constexpr int kStageBytes = kStageVectors * kVectorBytes;
  static constexpr int kStages = (48 << 10) / kStageBytes;
  // Blocks on a multiprocessor: as many as there are registers for.
  static constexpr int kRowBlocks = kSide == 3 ? 4 : 3;
  static constexpr int kPlaneBlocks = kSide == 3 ? 8 : kSide == 5 ? 6 : 4;

  // Input rows or columns that so many output ones reach.
  static __device__ __forceinline__ int reach(int outputs) {
    return (outputs - 1) * kStride + kSide;
  }
};

// One float for each sum of each thread; the pitch spreads a thread's over the banks.
constexpr int kSumsPitch = kDepthwiseThreads + 1;
template <int kSums>
constexpr int kSumsShared = kSums * kSumsPitch * static_cast<int>(sizeof(float));

// Adds the sums of all threads of a neuron, and calls `write(neuron, j, sum)` for each of them.
// Thread i has neuron i % across.
template <int kSums, class Write>
__device__ __forceinline__ void add_threads(const float (&sums)[kSums], int across, int neurons,
                                            unsigned char* shared, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const of_threads = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < kSums; ++j) of_threads[j * kSumsPitch + thread] = sums[j];
  __syncthreads();
  const int workers = kDepthwiseThreads / across;
  for (int i = thread; i < neurons * kSums; i += kDepthwiseThreads) {
    // Those of taps before the last ones: neighbours are neighbours in memory.
    const bool is_last = i >= neurons * (kSums - 1);
    const int neuron = is_last ? i - neurons * (kSums - 1) : i / (kSums - 1);
    const int j = is_last ? kSums - 1 : i % (kSums - 1);
    float sum = 0;
#pragma unroll 8
    for (int worker = 0; worker < workers; ++worker) {
      sum += of_threads[j * kSumsPitch + worker * across + neuron];
    }
    write(neuron, j, sum);
  }
}

// The same for all taps and, as the last sum, the bias.
template <int kSums, class T>
__device__ __forceinline__ void write_part(const Depthwise<T>& d, const float (&sums)[kSums],
                                           int first, int neurons, unsigned char* shared) {
  add_threads(sums, neurons, neurons, shared, [&](int neuron, int j, float sum) {
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

}  // namespace neq::cuda
