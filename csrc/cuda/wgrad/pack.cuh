// The active channels of each row, side by side, in front of a product that knows nothing of masks.
// Of each row those 16-byte vectors are read that hold an active channel, and 16 bytes are written
// at a time. The sums of the channels, which are their bias gradients, come with it.
#pragma once

#include "../common/ptx.cuh"
#include "../common/slots.cuh"

namespace neq::cuda {

constexpr int kPackThreads = 256, kPackRows = 16, kPackChannels = 128;
constexpr int kPackPitch = (kPackChannels + 1) * kVectorBytes;
constexpr int kPackShared = kPackRows * kPackPitch +
                            static_cast<int>(sizeof(Slots<kPackChannels>)) +
                            kPackThreads * static_cast<int>(sizeof(float));

// `rows` is [t, any] and `packed` [t, most] or, transposed, [most, t], of which the first `count`
// channels are written, rounded up to a whole vector where they lie side by side. `sums` is
// float[gridDim.x, most] or null. Rows of both start at multiples of 16 bytes.
template <class T>
struct Pack {
  const T* rows;
  int64_t stride;
  const int64_t* order;
  const int32_t* count;
  T* packed;
  int64_t packed_stride;
  float* sums;
  int64_t t;
  int most;
};

// Blocks: x for rows, which they take in turns; y for channels.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(Pack<T> p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.y) * kPackChannels;
  const int channels = smaller(smaller(*p.count, p.most) - first, kPackChannels);
  if (channels <= 0) return;
  unsigned char* staged = ptx::dynamic_shared();
  auto& slots = *reinterpret_cast<Slots<kPackChannels>*>(staged + kPackRows * kPackPitch);
  auto* shared_sums = reinterpret_cast<float*>(&slots + 1);
  find_slots<T>(p.order + first, channels, slots);

  // Each thread sums one channel of every other row.
  constexpr int kSumRows = kPackThreads / kPackChannels;
  const int summed = thread % kPackChannels;
  float sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackRows;
  for (int64_t from = static_cast<int64_t>(blockIdx.x) * kPackRows; from < p.t; from += step) {
    const int rows = static_cast<int>(smaller<int64_t>(p.t - from, kPackRows));
    for (int i = thread; i < rows * slots.count; i += kPackThreads) {
      const int row = i / slots.count, slot = i % slots.count;
      ptx::cp_async_16(staged + row * kPackPitch + slot * kVectorBytes,
                       p.rows + (from + row) * p.stride + slots.vector[slot] * kVector<T>, true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();

    const auto element = [&](int row, int channel) {
      return *reinterpret_cast<const T*>(staged + row * kPackPitch + slots.at[channel]);
    };
    if constexpr (kTransposed) {
      constexpr int kVectorsDown = kPackRows / kVector<T>;
      for (int i = thread; i < channels * kVectorsDown; i += kPackThreads) {
        const int channel = i / kVectorsDown, row = i % kVectorsDown * kVector<T>;
        if (row >= rows) continue;
        Vector<T> vector;
        for (int j = 0; j < kVector<T>; ++j) {
          vector[j] = row + j < rows ? element(row + j, channel) : from_float<T>(0);
        }
        vector.store(p.packed + (first + channel) * p.packed_stride + from + row);
      }
    } else {
      const int vectors = (channels + kVector<T> - 1) / kVector<T>;
      for (int i = thread; i < rows * vectors; i += kPackThreads) {
        const int row = i / vectors, channel = i % vectors * kVector<T>;
        Vector<T> vector;
        for (int j = 0; j < kVector<T>; ++j) {
          const bool exists = channel + j < channels;
          vector[j] = exists ? element(row, channel + j) : from_float<T>(0);
        }
        vector.store(p.packed + (from + row) * p.packed_stride + first + channel);
      }
    }
    if (p.sums != nullptr && summed < channels) {
      for (int row = thread / kPackChannels; row < rows; row += kSumRows) {
        sum += to_float(element(row, summed));
      }
    }
    __syncthreads();
  }
  if (p.sums == nullptr) return;
  shared_sums[thread] = sum;
  __syncthreads();
  if (thread >= channels) return;
  for (int other = 1; other < kSumRows; ++other) sum += shared_sums[other * kPackChannels + thread];
  p.sums[static_cast<int64_t>(blockIdx.x) * p.most + first + thread] = sum;
}

}  // namespace neq::cuda
