// Columns of a row-major matrix, gathered row by row. Included once per instruction set.
#ifdef NEQ_VECTOR_SHUFFLES
#include <immintrin.h>
#endif

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

template <class Word>
NEQ_TARGET void gather_columns(const ColumnGather& gather, const Word* from, int64_t from_stride,
                               Word* to, int64_t to_stride, int64_t rows) {
  int64_t row = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  constexpr int64_t kCacheLine = 64 / sizeof(Word);
  if (gather.n_windows > 0) {
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
    for (int64_t i = 0; i < gather.n; ++i) target[i] = source[gather.columns[i]];
  }
}

}  // namespace neq::NEQ_ISA
