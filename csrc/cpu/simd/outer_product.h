// The inner loops of the direct wgrad. Included once per instruction set.

#include "kernels.h"

namespace neq::NEQ_ISA {

// Vectors of sums in registers: with the operands they fill all 16.
constexpr int kMostSums = 12, kMostInRegisters = 4;

template <class C, int kRows, int kVectors>
NEQ_TARGET void outer_product_tile(const OuterProduct<C>& o, int64_t first, int64_t skip) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  const bool fresh = o.fresh;
  C* sums[kRows];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    sums[k] = o.sums[first + k] + o.at;
    __builtin_prefetch(sums[k], 1);
  }
  Vector total[kRows][kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[k][v] = Vector{};
  }
  for (int64_t image = 0; image < o.images; ++image) {
    for (int64_t row = 0; row < o.rows; ++row) {
      const C* dy = o.dy + image * o.dy_image + row * o.dy_row + first;
      const C* x = o.x + image * o.x_image + row * o.x_row;
      for (int64_t column = 0; column < o.columns; ++column) {
        Vector pixel[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) pixel[v] = load(x + v * kLanes);
#pragma GCC unroll 8
        for (int k = 0; k < kRows; ++k) {
          // Minus, not plus: x - 0 is x whatever its sign, and costs no instruction.
          const Vector d = dy[k] - Vector{};
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) total[k][v] += d * pixel[v];
        }
        dy += o.dy_column;
        x += o.x_column;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      C* to = sums[k] + v * kLanes;
      const Vector sum = fresh ? total[k][v] : load(to) + total[k][v];
      if constexpr (kVectors == 1) {
        // Lane by lane: the ones left out may be another thread's.
        if (skip > 0) {
#pragma GCC unroll 8
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            if (lane >= skip) to[lane] = sum[lane];
          }
          continue;
        }
      }
      std::memcpy(to, &sum, sizeof(sum));
    }
  }
}

// sums[k] += dy[k] * x over kPixels pixels: dy is in registers and the sums are in the first cache,
// so x is read in long stretches, which the CPU foresees.
template <class C, int kRows, int kPixels>
NEQ_TARGET inline void add_pixels(const C* dy, int64_t dy_column, const C* x, int64_t x_column,
                                  int64_t vectors, C (*sums)[kMostVectors * Lanes<C>::count]) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  Vector d[kPixels][kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) d[i][k] = dy[i * dy_column + k] - Vector{};
  }
  for (int64_t v = 0; v < vectors; ++v) {
    Vector pixel[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) pixel[i] = load(x + i * x_column + v * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      Vector total = load(sums[k] + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) total += d[i][k] * pixel[i];
      std::memcpy(sums[k] + v * kLanes, &total, sizeof(total));
    }
  }
}

template <class C, int kRows>
NEQ_TARGET void outer_product_wide(const OuterProduct<C>& o, int64_t vectors) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  constexpr int kPixels = kRows <= 2 ? 4 : kRows <= 4 ? 3 : 2;
  alignas(64) C sums[kRows][kMostVectors * kLanes];
  for (int k = 0; k < kRows; ++k) std::memset(sums[k], 0, vectors * sizeof(Vector));
  for (int64_t image = 0; image < o.images; ++image) {
    for (int64_t row = 0; row < o.rows; ++row) {
      const C* dy = o.dy + image * o.dy_image + row * o.dy_row;
      const C* x = o.x + image * o.x_image + row * o.x_row;
      int64_t column = 0;
      for (; column + kPixels <= o.columns; column += kPixels) {
        add_pixels<C, kRows, kPixels>(dy, o.dy_column, x, o.x_column, vectors, sums);
        dy += kPixels * o.dy_column;
        x += kPixels * o.x_column;
      }
      for (; column < o.columns; ++column) {
        add_pixels<C, kRows, 1>(dy, o.dy_column, x, o.x_column, vectors, sums);
        dy += o.dy_column;
        x += o.x_column;
      }
    }
  }
  for (int k = 0; k < kRows; ++k) {
    C* to = o.sums[k] + o.at;
    for (int64_t v = 0; v < vectors; ++v) {
      Vector sum = load(sums[k] + v * kLanes);
      if (!o.fresh) sum += load(to + v * kLanes);
      std::memcpy(to + v * kLanes, &sum, sizeof(sum));
    }
  }
}

template <class C, int kVectors, int kRows>
NEQ_TARGET void outer_product_rows(const OuterProduct<C>& o, int64_t first, int64_t n,
                                   int64_t skip) {
  if constexpr (kRows > 0) {
    if (n == kRows) {
      outer_product_tile<C, kRows, kVectors>(o, first, skip);
    } else {
      outer_product_rows<C, kVectors, kRows - 1>(o, first, n, skip);
    }
  }
}

// sums[k][at + c] += sum over the pixels of dy[k] * x[c], for k < n and c < `vectors` vectors; the
// first `skip` lanes, of a single vector, are left out.
template <class C>
NEQ_TARGET void outer_product(const OuterProduct<C>& o, int64_t n, int64_t vectors, int64_t skip) {
  using Function = void (*)(const OuterProduct<C>&, int64_t, int64_t, int64_t);
  static constexpr Function of_width[5] = {
      nullptr,
      outer_product_rows<C, 1, kRowsTogether>,
      outer_product_rows<C, 2, kRowsTogether>,
      outer_product_rows<C, 3, kMostSums / 3>,
      outer_product_rows<C, 4, kMostSums / 4>,
  };
  static constexpr int64_t most_of_width[5] = {0, kRowsTogether, kRowsTogether, kMostSums / 3,
                                               kMostSums / 4};
  if (vectors > kMostInRegisters) {
    static constexpr void (*wide[kRowsTogether + 1])(const OuterProduct<C>&, int64_t) = {
        nullptr,
        outer_product_wide<C, 1>,
        outer_product_wide<C, 2>,
        outer_product_wide<C, 3>,
        outer_product_wide<C, 4>,
        outer_product_wide<C, 5>,
        outer_product_wide<C, 6>,
    };
    return wide[n](o, vectors);
  }
  const int64_t most = most_of_width[vectors];
  if (n <= most) return of_width[vectors](o, 0, n, skip);
  int64_t first = 0;
  for (int64_t parts = (n + most - 1) / most; parts > 0; --parts) {
    const int64_t size = (n - first + parts - 1) / parts;
    of_width[vectors](o, first, size, skip);
    first += size;
  }
}

// totals[k] += sum over `count` pixels of from[pixel * n + k]; n is at most 8. Up to 7 elements
// behind the last one are read.
template <class C>
NEQ_TARGET void sum_pixels(const C* from, int64_t n, int64_t count, double* totals) {
  double even[8] = {}, odd[8] = {};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2, from += 2 * n) {
#pragma omp simd
    for (int64_t k = 0; k < 8; ++k) even[k] += static_cast<double>(from[k]);
#pragma omp simd
    for (int64_t k = 0; k < 8; ++k) odd[k] += static_cast<double>(from[n + k]);
  }
  for (int64_t k = 0; k < n; ++k) {
    totals[k] += even[k] + odd[k] + (i < count ? static_cast<double>(from[k]) : 0.0);
  }
}

// `vectors` vectors at to[i * to_stride] = those at from[i * stride], for i < count. What lies
// behind them in memory is expected to be next.
template <class C>
NEQ_TARGET void copy_pixels(const C* from, int64_t stride, int64_t vectors, int64_t count, C* to,
                            int64_t to_stride) {
  constexpr int64_t kLanes = Lanes<C>::count;
  for (int64_t i = 0; i < count; ++i, from += stride, to += to_stride) {
    __builtin_prefetch(from + vectors * kLanes);
    for (int64_t v = 0; v < vectors; ++v) {
      const auto pixel = load(from + v * kLanes);
      std::memcpy(to + v * kLanes, &pixel, sizeof(pixel));
    }
  }
}

#ifdef NEQ_VECTOR_SHUFFLES
NEQ_TARGET inline void transpose_8x8(const float* const* planes, int64_t first, float* to,
                                     int64_t width) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(planes[i] + first);
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
    _mm256_storeu_ps(to + i * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + (i + 4) * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// to[i * width + c] = planes[c][first + i], for c < n and i < count; n is at most 8 where the rows
// are as narrow as that.
template <class T>
NEQ_TARGET void interleave(const T* const* planes, int64_t n, int64_t first, int64_t count,
                           Compute<T>* to, int64_t width) {
  using C = Compute<T>;
  int64_t c = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  if constexpr (std::is_same_v<T, float>) {
    if (2 < n && n < 8) {
      const float* eight[8];
      for (int64_t j = 0; j < 8; ++j) eight[j] = planes[std::min(j, n - 1)];
      int64_t i = 0;
      // Whatever the last row stores past its end, there are rows left to overwrite it.
      for (; i + 16 <= count; i += 8) transpose_8x8(eight, first + i, to + i * width, width);
      for (; i < count; ++i) {
        for (int64_t j = 0; j < n; ++j) to[i * width + j] = planes[j][first + i];
      }
      return;
    }
    for (; c + 8 <= n; c += 8) {
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        transpose_8x8(planes + c, first + i, to + i * width + c, width);
      }
      for (; i < count; ++i) {
        for (int64_t j = c; j < c + 8; ++j) to[i * width + j] = planes[j][first + i];
      }
    }
  }
#endif
  for (; c < n; ++c) {
    for (int64_t i = 0; i < count; ++i) to[i * width + c] = static_cast<C>(planes[c][first + i]);
  }
}

}  // namespace neq::NEQ_ISA
