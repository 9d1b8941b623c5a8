// Sums of products of two outputs, channel by channel, in parts:
//
//   sums[0, k] = sum of a * b, sums[1, k] = sum of a * a, sums[2, k] = sum of b * b
//
// over all but the channels, in one pass over both. Products are added in float for a short run,
// and runs in double. Where channels lie innermost, a thread has neighbouring ones; where they do
// not, some whole channels, or a piece of one, are copied to shared memory.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "stretch.cuh"

namespace neq::cuda {

constexpr int kSimilarityThreads = 256, kProducts = 3, kMostAcross = 32;
// How many products are added in float, and how many rows are loaded together.
constexpr int kFloatRun = 32, kRowsTogether = 4;

// Elements that a block has of each tensor at a time where channels do not lie innermost.
template <class T>
constexpr int kPiece = 8192 / static_cast<int>(sizeof(T));
constexpr int kSimilarityStages = 2;

// Both tensors are [outer, k, inner]; k and inner lie one after the other. `parts` is
// double[parts, 3, k].
template <class T>
struct Similarity {
  const T* a;
  const T* b;
  double* parts;
  int64_t outer, k, inner, outer_stride, per_part;
  int across;    // channels innermost: vectors beside each other, a power of 2
  int together;  // channels of a block otherwise
  int pieces;    // of `inner`
};

// The three sums of one channel.
struct ChannelSums {
  float ab = 0, aa = 0, bb = 0;

  __device__ __forceinline__ void add(float a, float b) {
    ab += a * b;
    aa += a * a;
    bb += b * b;
  }
};

struct ChannelTotals {
  double of[kProducts] = {};

  __device__ __forceinline__ void add(ChannelSums& run) {
    of[0] += run.ab;
    of[1] += run.aa;
    of[2] += run.bb;
    run = {};
  }
};

// --- channels innermost --------------------------------------------------------------------------

// Neighbours that nobody else will read.
template <class T, int kWidth>
struct StreamedElements {
  uint4 bits{};

  static __device__ __forceinline__ StreamedElements load(const T* from) {
    return {ptx::load_16_streaming(from)};
  }
  __device__ __forceinline__ T& operator[](int i) { return reinterpret_cast<T*>(&bits)[i]; }
};
template <class T>
struct StreamedElements<T, 1> {
  T value{};

  static __device__ __forceinline__ StreamedElements load(const T* from) { return {*from}; }
  __device__ __forceinline__ T& operator[](int) { return value; }
};

// Blocks: x for channels, y for parts of the rows. kWidth elements at a time.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSimilarityThreads, 2) similarity_rows_kernel(Similarity<T> s) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % s.across, lanes = kSimilarityThreads / s.across;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * s.across * kWidth;
  const int64_t channel = first_channel + column * kWidth;
  const int64_t first = blockIdx.y * s.per_part;
  const int64_t end = smaller(first + s.per_part, s.outer);

  using Some = StreamedElements<T, kWidth>;
  ChannelTotals totals[kWidth];
  if (channel < s.k) {
    int64_t row = first + thread / s.across;
    const int64_t step = lanes * s.outer_stride;
    const T *a = s.a + row * s.outer_stride + channel, *b = s.b + row * s.outer_stride + channel;
    while (row < end) {
      ChannelSums run[kWidth];
#pragma unroll 1
      for (int i = 0; i < kFloatRun && row < end; i += kRowsTogether) {
        Some u[kRowsTogether], v[kRowsTogether];
#pragma unroll
        for (int j = 0; j < kRowsTogether; ++j) {
          u[j] = v[j] = Some{};
          if (row + j * lanes < end) {
            u[j] = Some::load(a + j * step);
            v[j] = Some::load(b + j * step);
          }
        }
#pragma unroll
        for (int j = 0; j < kRowsTogether; ++j) {
#pragma unroll
          for (int of = 0; of < kWidth; ++of) run[of].add(to_float(u[j][of]), to_float(v[j][of]));
        }
        row += kRowsTogether * lanes;
        a += kRowsTogether * step;
        b += kRowsTogether * step;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) totals[j].add(run[j]);
    }
  }

  auto* const shared = reinterpret_cast<double*>(ptx::dynamic_shared());
  for (int product = 0; product < kProducts; ++product) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      shared[j * kSimilarityThreads + thread] = totals[j].of[product];
    __syncthreads();
    for (int i = thread; i < s.across * kWidth; i += kSimilarityThreads) {
      if (first_channel + i >= s.k) break;
      const double* from = shared + i % kWidth * kSimilarityThreads + i / kWidth;
      double sum = 0;
      for (int lane = 0; lane < lanes; ++lane) sum += from[lane * s.across];
      s.parts[(static_cast<int64_t>(blockIdx.y) * kProducts + product) * s.k + first_channel + i] =
          sum;
    }
  }
}

// --- channels outside ----------------------------------------------------------------------------

template <class T>
constexpr int kStretchRoom = kPiece<T> + 2 * kVector<T>;
template <class T>
constexpr int kSimilarityShared =
    kSimilarityStages * 2 * kStretchRoom<T> * static_cast<int>(sizeof(T));

// Blocks: x for channels, y for parts. A part is some steps: each is a piece of the block's
// channels at one outer index.
template <class T>
__global__ void __launch_bounds__(kSimilarityThreads, 4) similarity_planes_kernel(Similarity<T> s) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x) * s.together;
  const int channels = static_cast<int>(smaller<int64_t>(s.together, s.k - first_channel));
  const int64_t first = blockIdx.y * s.per_part;
  const int64_t end = smaller(first + s.per_part, s.outer * s.pieces);
  // Where there is more than one piece, there is one channel.
  const auto stretches = [&](int64_t step) {
    const int64_t outer = step / s.pieces, at = step % s.pieces * kPiece<T>;
    const int64_t offset = outer * s.outer_stride + first_channel * s.inner + at;
    const auto count = static_cast<int>(smaller<int64_t>(channels * s.inner - at, kPiece<T>));
    struct Both {
      Stretch<T> a, b;
    };
    return Both{{s.a, s.a + offset, count}, {s.b, s.b + offset, count}};
  };
  auto* const shared = reinterpret_cast<T*>(ptx::dynamic_shared());
  const auto stage = [&](int64_t step) {
    return shared + (step - first) % kSimilarityStages * 2 * kStretchRoom<T>;
  };
  const auto copy = [&](int64_t step) {
    if (step < end) {
      const auto from = stretches(step);
      for (int i = thread; i < from.a.vectors(); i += kSimilarityThreads) {
        from.a.copy(stage(step), i);
      }
      for (int i = thread; i < from.b.vectors(); i += kSimilarityThreads) {
        from.b.copy(stage(step) + kStretchRoom<T>, i);
      }
    }
    ptx::cp_async_commit();
  };

  // As many threads for each channel as there are, a power of 2.
  int lanes = kSimilarityThreads;
  while (lanes * channels > kSimilarityThreads) lanes /= 2;
  const int channel = thread / lanes, lane = thread % lanes;
  ChannelTotals totals;
  copy(first);
  for (int64_t step = first; step < end; ++step) {
    copy(step + 1);
    ptx::cp_async_wait<kSimilarityStages - 1>();
    __syncthreads();
    const auto from = stretches(step);
    const int count = s.pieces > 1 ? from.a.count : static_cast<int>(s.inner);
    if (channel < channels) {
      const T* const a = stage(step) + from.a.shift() + channel * count;
      const T* const b = stage(step) + kStretchRoom<T> + from.b.shift() + channel * count;
      for (int i = lane; i < count;) {
        ChannelSums run;
#pragma unroll 4
        for (int j = 0; j < kFloatRun && i < count; ++j, i += lanes) {
          run.add(to_float(a[i]), to_float(b[i]));
        }
        totals.add(run);
      }
    }
    __syncthreads();
  }

  auto* const sums = reinterpret_cast<double*>(shared);
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    sums[product * kSimilarityThreads + thread] = totals.of[product];
  }
  __syncthreads();
  for (int i = thread; i < kProducts * channels; i += kSimilarityThreads) {
    const int product = i / channels, of = i % channels;
    const double* from_lanes = sums + product * kSimilarityThreads + of * lanes;
    double sum = 0;
    for (int other = 0; other < lanes; ++other) sum += from_lanes[other];
    s.parts[(static_cast<int64_t>(blockIdx.y) * kProducts + product) * s.k + first_channel + of] =
        sum;
  }
}

}  // namespace neq::cuda
