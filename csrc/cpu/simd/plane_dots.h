// Dot products of planes: what a 1x1 convolution's wgrad is where the pixels of a channel lie side
// by side. Included once per instruction set.
#ifdef NEQ_VECTOR_SHUFFLES
#include <immintrin.h>
#endif

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

// Channels of dy and of x whose sums are in registers at the same time.
constexpr int kDotRows = NEQ_REGISTER_BYTES == 64 ? 6 : 3, kDotColumns = 4;

// The first `count` elements, fewer than a register holds, and zeros.
template <class Packed, class T>
NEQ_TARGET inline __attribute__((always_inline)) Packed load_some(const T* from, int64_t count) {
#if defined(NEQ_VECTOR_SHUFFLES) && NEQ_REGISTER_BYTES == 64
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 2) return Packed(_mm512_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(T) == 4) {
    return Packed(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from));
  }
  if constexpr (sizeof(T) == 8) {
    return Packed(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from));
  }
#elif defined(NEQ_VECTOR_SHUFFLES)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return Packed(_mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask));
  }
#endif
  Packed some{};
  std::memcpy(&some, from, count * sizeof(T));
  return some;
}

// to[i] = the sum of the lanes of total[i], added to what is there unless it is fresh.
template <class C, int kCount, class Vector>
NEQ_TARGET inline __attribute__((always_inline)) void write_lane_sums(const Vector* total,
                                                                      bool fresh, C* to) {
#ifdef NEQ_VECTOR_SHUFFLES
  if constexpr (std::is_same_v<C, float> && kCount == 4) {
    __m256 half[4];
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
#if NEQ_REGISTER_BYTES == 64
      const __m512 whole = __m512(total[i]);
      half[i] = _mm512_maskz_extractf32x8_ps(0xFF, whole, 0) +
                _mm512_maskz_extractf32x8_ps(0xFF, whole, 1);
#else
      half[i] = __m256(total[i]);
#endif
    }
    const __m256 sums =
        _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    __m128 sum = _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
    if (!fresh) sum += _mm_loadu_ps(to);
    _mm_storeu_ps(to, sum);
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) {
    C sum = 0;
    for (size_t lane = 0; lane < sizeof(Vector) / sizeof(C); ++lane) sum += total[i][lane];
    to[i] = fresh ? sum : to[i] + sum;
  }
}

template <class T, class P, int kRows, int kColumns>
NEQ_TARGET void dot_tile(const PlaneDots<T, P>& o, int64_t first, int64_t column) {
  using C = SumOf<P>;
  using Vector = typename Register<C, NEQ_REGISTER_BYTES>::Type;
  using Packed = typename Register<P, NEQ_REGISTER_BYTES>::Type;
  constexpr int64_t kElements = NEQ_REGISTER_BYTES / static_cast<int64_t>(sizeof(T));
  Vector total[kRows][kColumns];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) total[k][c] = Vector{};
  }
  for (int64_t image = 0; image < o.images; ++image) {
    const T* x = o.x + image * o.x_image + column * o.x_plane;
    int64_t dy_at = image * o.dy_image;
    int64_t i = 0;
    for (; i + kElements <= o.pixels; i += kElements, x += kElements, dy_at += kElements) {
      Packed pixels[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        pixels[c] = load_as<Packed>(x + c * o.x_plane);
        keep_in_register(pixels[c]);
        if (o.x_is_new) __builtin_prefetch(x + (c + kColumns) * o.x_plane);
      }
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) {
        const Packed d = load_as<Packed>(o.dy[first + k] + dy_at);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) multiply_add(total[k][c], d, pixels[c]);
      }
    }
    if (i == o.pixels) continue;
    Packed pixels[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      pixels[c] = load_some<Packed>(x + c * o.x_plane, o.pixels - i);
      if (o.x_is_new) __builtin_prefetch(x + (c + kColumns) * o.x_plane);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const Packed d = load_some<Packed>(o.dy[first + k] + dy_at, o.pixels - i);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) multiply_add(total[k][c], d, pixels[c]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    write_lane_sums<C, kColumns>(total[k], o.fresh, o.sums[first + k] + o.at + column);
  }
}

template <class T, class P, int kRows, int kColumns>
NEQ_TARGET void dot_rows(const PlaneDots<T, P>& o, int64_t first, int64_t n, int64_t column) {
  if constexpr (kRows > 0) {
    if (n != kRows) return dot_rows<T, P, kRows - 1, kColumns>(o, first, n, column);
    dot_tile<T, P, kRows, kColumns>(o, first, column);
  }
}

// sums[k][at + c] += sum over the pixels of dy[k] * x[c], for k < n and begin <= c < end.
template <class T, class P>
NEQ_TARGET void plane_dots(const PlaneDots<T, P>& o, int64_t n, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end;) {
    const bool are_many = column + kDotColumns <= end;
    for (int64_t first = 0; first < n; first += kDotRows) {
      const int64_t some = std::min<int64_t>(kDotRows, n - first);
      if (are_many) {
        dot_rows<T, P, kDotRows, kDotColumns>(o, first, some, column);
      } else {
        dot_rows<T, P, kDotRows, 1>(o, first, some, column);
      }
    }
    column += are_many ? kDotColumns : 1;
  }
}

}  // namespace neq::NEQ_ISA
