// Neighbours of global memory that start anywhere, copied to shared memory in the background.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"

namespace neq::cuda {

// In shared memory each lies in its 16 bytes as it does in global memory: the first one `shift()`
// elements from the start. Before it lies whatever precedes it in the tensor.
template <class T>
struct Stretch {
  const T* tensor;
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

  // Starts a copy of what lies in one vector. Only where the tensor itself begins within a vector
  // are elements copied one by one.
  __device__ __forceinline__ void copy(T* to, int vector) const {
    const int at = vector * kVector<T>, begin = at - shift();
    const int elements = smaller(count - begin, kVector<T>);
    if (elements <= 0) return;
    if (from - tensor + begin >= 0) {
      ptx::cp_async_up_to_16(to + at, from + begin, elements * static_cast<int>(sizeof(T)));
    } else {
      for (int i = -begin; i < elements; ++i) to[at + i] = from[begin + i];
    }
  }
};

}  // namespace neq::cuda
