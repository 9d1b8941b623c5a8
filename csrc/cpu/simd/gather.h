// Columns of a row-major matrix, gathered row by row. Included once per instruction set.
#ifdef NEQ_VECTOR_SHUFFLES
#include <immintrin.h>
#endif

#include "kernels.h"

namespace neq::NEQ_ISA {

#ifdef NEQ_VECTOR_SHUFFLES
NEQ_TARGET inline void shuffle_window(const uint16_t* from, uint16_t* to, const Window& window) {
  const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(window.lanes));
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, lanes));
}

template <class Word>
NEQ_TARGET inline void shuffle_window(const Word* from, Word* to, const Window& window) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.lanes));
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(words, lanes));
}
#endif

#ifdef NEQ_VECTOR_SHUFFLES
// Columns that fit into one vector, from `kWindows` windows: a row is stored at once, and what that
// writes past its end the next row overwrites. Returns how many rows are done: the others have not
// enough room behind them.
template <int kWindows>
NEQ_TARGET int64_t gather_vector(const ColumnGather& gather, const uint32_t* from,
                                 int64_t from_stride, uint32_t* to, int64_t to_stride,
                                 int64_t rows) {
  __m256i lanes[kWindows];
  __m256 is_later[kWindows];
#pragma GCC unroll 4
  for (int w = 0; w < kWindows; ++w) {
    const Window& window = gather.windows[w];
    lanes[w] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window.lanes));
    is_later[w] = _mm256_loadu_ps(reinterpret_cast<const float*>(window.later));
  }
  if (gather.room < 8) rows -= (8 + to_stride - 1) / to_stride;
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t* source = from + row * from_stride;
    if (gather.soon_first <= gather.soon_last) {
      __builtin_prefetch(source + gather.soon_first);
      __builtin_prefetch(source + gather.soon_last);
    }
    __m256 words{};
#pragma GCC unroll 4
    for (int w = 0; w < kWindows; ++w) {
      const __m256i window =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + gather.windows[w].from));
      const __m256 moved = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(window, lanes[w]));
      words = w == 0 ? moved : _mm256_blendv_ps(words, moved, is_later[w]);
    }
    _mm256_storeu_ps(reinterpret_cast<float*>(to + row * to_stride), words);
  }
  return std::max<int64_t>(0, rows);
}

NEQ_TARGET inline int64_t gather_vectors(const ColumnGather& gather, const uint32_t* from,
                                         int64_t from_stride, uint32_t* to, int64_t to_stride,
                                         int64_t rows) {
  switch (gather.n_windows) {
    case 1:
      return gather_vector<1>(gather, from, from_stride, to, to_stride, rows);
    case 2:
      return gather_vector<2>(gather, from, from_stride, to, to_stride, rows);
    case 3:
      return gather_vector<3>(gather, from, from_stride, to, to_stride, rows);
    default:
      return gather_vector<4>(gather, from, from_stride, to, to_stride, rows);
  }
}
#endif

template <class Word>
NEQ_TARGET void gather_columns(const ColumnGather& gather, const Word* from, int64_t from_stride,
                               Word* to, int64_t to_stride, int64_t rows) {
  constexpr int64_t kCacheLine = 64 / sizeof(Word);
  int64_t row = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  if (gather.one_vector) {
    if constexpr (sizeof(Word) == 4) {
      row = gather_vectors(gather, from, from_stride, to, to_stride, rows);
    }
  } else if (gather.n_windows > 0 && gather.n_windows < gather.n) {
    // A window stores a whole vector: what it writes past its own columns, the next window or the
    // next row overwrites. The rows at the end, where that would pass the result's own end, are
    // left to the loop below.
    const int64_t row_end = gather.windows[gather.n_windows - 1].to + kWindowLanes<Word>;
    const int64_t end = (rows - 1) * to_stride + gather.n;
    const int64_t safe_rows = end < row_end ? 0 : (end - row_end) / to_stride + 1;
    for (; row < safe_rows; ++row) {
      const Word* source = from + row * from_stride;
      Word* target = to + row * to_stride;
      for (int64_t column = gather.soon_first; column <= gather.soon_last; column += kCacheLine) {
        __builtin_prefetch(source + column);
      }
      for (int64_t w = 0; w < gather.n_windows; ++w) {
        const Window& window = gather.windows[w];
        shuffle_window(source + window.from, target + window.to, window);
      }
    }
  }
#endif
  for (; row < rows; ++row) {
    const Word* source = from + row * from_stride;
    Word* target = to + row * to_stride;
    for (int64_t column = gather.soon_first; column <= gather.soon_last; column += kCacheLine) {
      __builtin_prefetch(source + column);
    }
    for (int64_t i = 0; i < gather.n; ++i) target[i] = source[gather.columns[i]];
  }
}

}  // namespace neq::NEQ_ISA
