// The inner loops of the direct wgrad. Included once per instruction set.

namespace neq::NEQ_ISA {

constexpr int kMostSums = 12;  // vectors; with the operands they fill 16 registers

template <class C, int kRows, int kVectors>
NEQ_TARGET void outer_product_tile(const OuterProduct<C>& o, int64_t skip, C* sums,
                                   int64_t sums_row) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  Vector total[kRows][kVectors] = {};
  for (int64_t row = 0; row < o.rows; ++row) {
    const C* dy = o.dy + row * o.dy_row;
    const C* x = o.x + row * o.x_row;
    for (int64_t column = 0; column < o.columns; ++column) {
      Vector pixel[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) pixel[v] = load(x + v * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) {
        const Vector d = Vector{} + dy[k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[k][v] += d * pixel[v];
      }
      dy += o.dy_column;
      x += o.x_column;
    }
  }
  if (skip > 0) {
    for (int k = 0; k < kRows; ++k) {
      C lanes[kLanes];
      std::memcpy(lanes, &total[k][0], sizeof(lanes));
      for (int64_t lane = skip; lane < kLanes; ++lane) sums[k * sums_row + lane] += lanes[lane];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    C* to = sums + k * sums_row;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (v == 0 && skip > 0) continue;
      const Vector sum = load(to + v * kLanes) + total[k][v];
      std::memcpy(to + v * kLanes, &sum, sizeof(sum));
    }
  }
}

template <class C, int kVectors, int kRows = kMostSums / kVectors>
NEQ_TARGET void outer_product_rows(const OuterProduct<C>& o, int64_t n, int64_t skip, C* sums,
                                   int64_t sums_row) {
  if constexpr (kRows > 0) {
    if (n == kRows) {
      outer_product_tile<C, kRows, kVectors>(o, skip, sums, sums_row);
    } else {
      outer_product_rows<C, kVectors, kRows - 1>(o, n, skip, sums, sums_row);
    }
  }
}

// sums[k * sums_row + c] += sum over the pixels of dy[k] * x[c], for k < n and c < `vectors`
// vectors; the first `skip` lanes are left out.
template <class C>
NEQ_TARGET void outer_product(const OuterProduct<C>& o, int64_t n, int64_t vectors, int64_t skip,
                              C* sums, int64_t sums_row) {
  using Function = void (*)(const OuterProduct<C>&, int64_t, int64_t, C*, int64_t);
  static constexpr Function of_width[5] = {
      nullptr,
      outer_product_rows<C, 1, 6>,
      outer_product_rows<C, 2>,
      outer_product_rows<C, 3>,
      outer_product_rows<C, 4>,
  };
  const int64_t most = std::min<int64_t>(6, kMostSums / vectors);
  OuterProduct<C> part = o;
  for (int64_t parts = (n + most - 1) / most; parts > 0; --parts) {
    const int64_t size = (n + parts - 1) / parts;
    of_width[vectors](part, size, skip, sums, sums_row);
    part.dy += size;
    sums += size * sums_row;
    n -= size;
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
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * width, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// to[i * width + c] = planes[c][first + i], for c < n and i < count.
template <class T>
NEQ_TARGET void interleave(const T* const* planes, int64_t n, int64_t first, int64_t count,
                           Compute<T>* to, int64_t width) {
  using C = Compute<T>;
  int64_t c = 0;
#ifdef NEQ_VECTOR_SHUFFLES
  if constexpr (std::is_same_v<T, float>) {
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
