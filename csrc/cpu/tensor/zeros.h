// Zeros for frozen neurons.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace neq {

constexpr int64_t kStreamedBytes = 1 << 19;  // about the second cache of a core

// Sets parts of a gradient of `all_bytes` to 0. Those of a large one are written past the caches:
// nobody reads them soon, and what they would drive out is about to be read. Other threads see them
// once it is gone.
class Zeros {
 public:
  explicit Zeros(int64_t all_bytes) : streams_(all_bytes >= kStreamedBytes) {}
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  ~Zeros() {
#ifdef __SSE2__
    if (streams_) _mm_sfence();
#endif
  }

  void write(void* to, int64_t bytes) const {
    char* at = static_cast<char*>(to);
    char* const end = at + bytes;
#ifdef __SSE2__
    if (streams_) {
      constexpr int64_t kVector = sizeof(__m128i);
      const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % kVector);
      if (misaligned > 0 && bytes >= kVector) {
        std::memset(at, 0, static_cast<size_t>(kVector));
        at += kVector - misaligned;
      }
      for (; at + kVector <= end; at += kVector) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
      }
    }
#endif
    std::memset(at, 0, static_cast<size_t>(end - at));
  }

 private:
  bool streams_;
};

}  // namespace neq
