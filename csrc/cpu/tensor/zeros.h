// Zeros for frozen neurons.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace neq {

constexpr int64_t kStreamedBytes = 1 << 19;  // about the second cache of a core

// Sets `bytes` of a gradient of `all_bytes` to 0. Those of a large one are written past the caches:
// nobody reads them soon, and what they would drive out is about to be read.
inline void write_zeros(void* to, int64_t bytes, int64_t all_bytes) {
#ifdef __SSE2__
  if (all_bytes >= kStreamedBytes) {
    constexpr int64_t kVector = sizeof(__m128i);
    char* at = static_cast<char*>(to);
    char* const end = at + bytes;
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % kVector);
    if (misaligned > 0 && bytes >= kVector) {
      std::memset(at, 0, static_cast<size_t>(kVector));
      at += kVector - misaligned;
    }
    for (; at + kVector <= end; at += kVector) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
    }
    std::memset(at, 0, static_cast<size_t>(end - at));
    _mm_sfence();
    return;
  }
#endif
  std::memset(to, 0, static_cast<size_t>(bytes));
}

}  // namespace neq
