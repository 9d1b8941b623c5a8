// Neighbours of global memory that start anywhere, copied to shared memory in the background.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"

namespace neq::cuda {

// In shared memory each lies in its 16 bytes as it does in global memory: the first one `shift()`
// elements from the start.
template <class T>
struct Stretch {
  const T* from;
  int count;

  // That hold so many neighbours, at most.
  static constexpr __host__ __device__ int most_vectors(int count) {
    return count / kVector<T> + 2;
  }

  __device__ __forceinline__ int shift() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(from) % kVectorBytes / sizeof(T));
  }

  __device__ __forceinline__ int vectors() const {
    return (shift() + count + kVector<T> - 1) / kVector<T>;
  }

  // Starts a copy of what lies in one vector.
  __device__ __forceinline__ void copy(T* to, int vector) const {
    const int at = vector * kVector<T>, begin = at - shift();
    if (begin >= 0 && begin + kVector<T> <= count) {
      ptx::cp_async_16(to + at, from + begin, true);
      return;
    }
    for (int i = begin < 0 ? -begin : 0; i < kVector<T> && begin + i < count; ++i) {
      to[at + i] = from[begin + i];
    }
  }
};

}  // namespace neq::cuda
