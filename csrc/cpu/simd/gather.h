// Columns of a row-major matrix, gathered row by row. Included once per instruction set.
#ifdef NEQ_VECTOR_SHUFFLES
#include <immintrin.h>
#endif

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

// Windows that are blended into one vector: with their controls they fill the registers.
constexpr int kMostBlended = NEQ_REGISTER_BYTES == 64 ? 8 : 4;

template <class T, class P>
constexpr bool kMakesPairs = kIsPair<P> && !kIsPair<T>;

#ifdef NEQ_VECTOR_SHUFFLES
NEQ_TARGET inline void shuffle_window(const uint16_t* from, uint16_t* to, const Window& window,
                                      int64_t) {
  const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(window.lanes));
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, lanes));
}

template <class T, class P>
NEQ_TARGET inline void shuffle_window(const T* from, P* to, const Window& window, int64_t next) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.lanes));
  const __m256i words = __m256i(load_as_packed<P>(from, next));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(words, lanes));
}
#endif

#ifdef NEQ_VECTOR_SHUFFLES
#if NEQ_REGISTER_BYTES == 64
using IsLater = __mmask8;
NEQ_TARGET inline __attribute__((always_inline)) IsLater later_lanes(const Window& window) {
  return _mm256_movepi32_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.later)));
}
NEQ_TARGET inline __attribute__((always_inline)) __m256i move_later(__m256i words, __m256i window,
                                                                    __m256i lanes, IsLater later) {
  return _mm256_mask_permutexvar_epi32(words, later, lanes, window);
}
#else
using IsLater = __m256;
NEQ_TARGET inline __attribute__((always_inline)) IsLater later_lanes(const Window& window) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(window.later));
}
NEQ_TARGET inline __attribute__((always_inline)) __m256i move_later(__m256i words, __m256i window,
                                                                    __m256i lanes, IsLater later) {
  const __m256 moved = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(window, lanes));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(words), moved, later));
}
#endif

template <int kWindows, class P, class T>
NEQ_TARGET inline
    __attribute__((always_inline)) __m256i gather_row(const ColumnGather& gather, const T* source,
                                                      const __m256i* lanes,
                                                      const IsLater* is_later) {
  __m256i words{};
#pragma GCC unroll 8
  for (int w = 0; w < kWindows; ++w) {
    const __m256i window = __m256i(load_as_packed<P>(source + gather.windows[w].from));
    words = w == 0 ? _mm256_permutevar8x32_epi32(window, lanes[w])
                   : move_later(words, window, lanes[w], is_later[w]);
  }
  return words;
}

// Columns that fit into one vector, from `kWindows` windows: a row is stored at once, and what that
// writes past its end the next row overwrites. Returns how many rows are done: the others have not
// enough room behind them.
template <int kWindows, class T, class P>
NEQ_TARGET int64_t gather_vector(const ColumnGather& gather, const T* from, int64_t from_stride,
                                 P* to, int64_t to_stride, int64_t rows) {
  __m256i lanes[kWindows];
  IsLater is_later[kWindows];
#pragma GCC unroll 8
  for (int w = 0; w < kWindows; ++w) {
    const Window& window = gather.windows[w];
    lanes[w] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.lanes));
    is_later[w] = later_lanes(window);
  }
  if (gather.room < 8) rows -= (8 + to_stride - 1) / to_stride;
  // Pairs are made of whole vectors. Where the second row of one is the first of the next, it is
  // read once.
  const bool overlap = gather.next == from_stride;
  __m256i second{};
  if constexpr (kMakesPairs<T, P>) {
    if (rows > 0 && overlap) second = gather_row<kWindows, float>(gather, from, lanes, is_later);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = from + row * from_stride;
    if (gather.soon_first <= gather.soon_last) {
      __builtin_prefetch(source + gather.soon_first);
      __builtin_prefetch(source + gather.soon_last);
      if (kMakesPairs<T, P> && !overlap) {
        __builtin_prefetch(source + gather.next + gather.soon_first);
        __builtin_prefetch(source + gather.next + gather.soon_last);
      }
    }
    if (gather.far > 0) {
#pragma GCC unroll 8
      for (int w = 0; w < kWindows; ++w) {
        const T* ahead = source + gather.far + gather.windows[w].from;
        __builtin_prefetch(ahead);
        if (kMakesPairs<T, P> && !overlap) __builtin_prefetch(ahead + gather.next);
      }
    }
    __m256i words;
    if constexpr (kMakesPairs<T, P>) {
      const __m256i first =
          overlap ? second : gather_row<kWindows, float>(gather, source, lanes, is_later);
      second = gather_row<kWindows, float>(gather, source + gather.next, lanes, is_later);
      words = _mm256_or_si256(_mm256_srli_epi32(first, 16), second);
    } else {
      words = gather_row<kWindows, P>(gather, source, lanes, is_later);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row * to_stride), words);
  }
  return std::max<int64_t>(0, rows);
}

template <int kWindows, class T, class P>
NEQ_TARGET int64_t gather_vectors(const ColumnGather& gather, const T* from, int64_t from_stride,
                                  P* to, int64_t to_stride, int64_t rows) {
  if constexpr (kWindows > 1) {
    if (gather.n_windows < kWindows) {
      return gather_vectors<kWindows - 1>(gather, from, from_stride, to, to_stride, rows);
    }
  }
  return gather_vector<kWindows>(gather, from, from_stride, to, to_stride, rows);
}
#endif

// Columns of T as columns of P.
template <class T, class P>
NEQ_TARGET void gather_columns(const ColumnGather& gather, const T* from, int64_t from_stride,
                               P* to, int64_t to_stride, int64_t rows) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  int64_t row = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  if (gather.one_vector) {
    if constexpr (sizeof(P) == 4) {
      row = gather_vectors<kMostBlended>(gather, from, from_stride, to, to_stride, rows);
    }
  } else if (gather.n_windows > 0 && gather.n_windows < gather.n) {
    // A window stores a whole vector: what it writes past its own columns, the next window or the
    // next row overwrites. The rows at the end, where that would pass the result's own end, are
    // left to the loop below.
    const int64_t row_end = gather.windows[gather.n_windows - 1].to + kWindowLanes<P>;
    const int64_t end = (rows - 1) * to_stride + gather.n;
    const int64_t safe_rows = end < row_end ? 0 : (end - row_end) / to_stride + 1;
    for (; row < safe_rows; ++row) {
      const T* source = from + row * from_stride;
      P* target = to + row * to_stride;
      for (int64_t column = gather.soon_first; column <= gather.soon_last; column += kCacheLine) {
        __builtin_prefetch(source + column);
      }
      for (int64_t w = 0; w < gather.n_windows; ++w) {
        const Window& window = gather.windows[w];
        if (gather.far > 0) __builtin_prefetch(source + gather.far + window.from);
        shuffle_window(source + window.from, target + window.to, window, gather.next);
      }
    }
  }
#endif
  for (; row < rows; ++row) {
    const T* source = from + row * from_stride;
    P* target = to + row * to_stride;
    for (int64_t column = gather.soon_first; column <= gather.soon_last; column += kCacheLine) {
      __builtin_prefetch(source + column);
    }
    for (int64_t i = 0; i < gather.n; ++i) {
      if (gather.far > 0) __builtin_prefetch(source + gather.far + gather.columns[i]);
      target[i] = packed_element<P>(source + gather.columns[i], gather.next);
    }
  }
}

}  // namespace neq::NEQ_ISA
