// Copies of the direct wgrad's operands: channels side by side, as they are multiplied. Included
// once per instruction set.
#ifdef NEQ_VECTOR_SHUFFLES
#include <immintrin.h>
#endif

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

// `vectors` vectors at to[i * to_stride] = those at from[i * stride], for i < count. What is new to
// the caches is fetched some rows ahead.
template <class T, class P, bool kIsNew>
NEQ_TARGET void copy_pixels(const T* from, int64_t stride, int64_t vectors, int64_t count, P* to,
                            int64_t to_stride, int64_t next) {
  constexpr int64_t kLanes = Lanes<P>::count, kLine = 64 / sizeof(T);
  const int64_t far = far_ahead<T>(stride);
  for (int64_t i = 0; i < count; ++i, from += stride, to += to_stride) {
    int64_t v = 0;
    if constexpr (kIsNew) {
      const T* ahead = from + far;
      for (int64_t c = 0; c < vectors * kLanes; c += kLine) {
        __builtin_prefetch(ahead + c);
        if (kIsPair<P> && next != stride) __builtin_prefetch(ahead + next + c);
      }
    }
    if constexpr (!std::is_same_v<T, P>) {
      for (; v + kVectorsOfRegister <= vectors; v += kVectorsOfRegister) {
        const auto pixel = load_as_packed<P, NEQ_REGISTER_BYTES>(from + v * kLanes, next);
        std::memcpy(to + v * kLanes, &pixel, sizeof(pixel));
      }
    }
    for (; v < vectors; ++v) {
      const auto pixel = load_as_packed<P>(from + v * kLanes, next);
      std::memcpy(to + v * kLanes, &pixel, sizeof(pixel));
    }
  }
}

#ifdef NEQ_VECTOR_SHUFFLES
template <class T, class P>
NEQ_TARGET inline void transpose_8x8(const T* const* planes, int64_t first, P* to, int64_t width,
                                     int64_t next, int64_t apart) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = __m256(load_as_packed<P>(planes[i] + first, next, apart));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  // In ascending order: where rows are narrower than a vector, each overwrites what the one before
  // stored past its end.
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * width),
                     _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * width),
                     _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// to[i * width + c] = planes[c][first + i * apart], for c < n and i < count; n is at most 8 where
// the rows are as narrow as that. `apart` is 1, or 2 where every other element begins a pair with
// its neighbour.
template <class T, class P>
NEQ_TARGET void interleave(const T* const* planes, int64_t n, int64_t first, int64_t count, P* to,
                           int64_t width, int64_t next, int64_t apart) {
  if constexpr (!kIsPair<P>) apart = 1;
  int64_t c = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  if constexpr (sizeof(P) == 4) {
    if (2 < n && n < 8) {
      const T* eight[8];
      for (int64_t j = 0; j < 8; ++j) eight[j] = planes[std::min(j, n - 1)];
      int64_t i = 0;
      // Whatever the last row stores past its end, there are rows left to overwrite it.
      for (; i + 16 <= count; i += 8) {
        transpose_8x8(eight, first + i * apart, to + i * width, width, next, apart);
      }
      for (; i < count; ++i) {
        for (int64_t j = 0; j < n; ++j)
          to[i * width + j] = packed_element<P>(planes[j] + first + i * apart, next);
      }
      return;
    }
    for (; c + 8 <= n; c += 8) {
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        transpose_8x8(planes + c, first + i * apart, to + i * width + c, width, next, apart);
      }
      for (; i < count; ++i) {
        for (int64_t j = c; j < c + 8; ++j)
          to[i * width + j] = packed_element<P>(planes[j] + first + i * apart, next);
      }
    }
  }
#endif
  for (; c < n; ++c) {
    for (int64_t i = 0; i < count; ++i)
      to[i * width + c] = packed_element<P>(planes[c] + first + i * apart, next);
  }
}

// Every step-th element of each row.
template <class T>
NEQ_TARGET void take_steps(const T* from, int64_t from_row, int64_t step, T* to, int64_t to_row,
                           int64_t rows, int64_t count) {
  if constexpr (sizeof(T) == 2) {
    copy_rows(&from->x, from_row, step, &to->x, to_row, rows, count);
  } else {
    copy_rows(from, from_row, step, to, to_row, rows, count);
  }
}

// Each element with the one `next` behind it, where there is one.
NEQ_TARGET inline void pair_up(Pair* elements, int64_t count, int64_t next) {
  constexpr int64_t kLanes = Lanes<Pair>::count;
  int64_t i = 0;
  for (; i + next + kLanes <= count; i += kLanes) {
    const auto pair = (load(elements + i) & 0xFFFFU) | load(elements + i + next) << 16;
    std::memcpy(elements + i, &pair, sizeof(pair));
  }
  for (; i + next < count; ++i) {
    elements[i] = Pair{(static_cast<uint32_t>(elements[i]) & 0xFFFFU) |
                       static_cast<uint32_t>(elements[i + next]) << 16};
  }
}

}  // namespace neq::NEQ_ISA
