// Sums of a*b, a*a and b*b in double. Included once per instruction set.

#include "kernels.h"

namespace neq::NEQ_ISA {

// Over one stretch of memory: adds to sums[0..2].
template <class T>
NEQ_TARGET void products_of_run(const T* a, const T* b, int64_t count, double* sums) {
  double ab = 0, aa = 0, bb = 0;
#pragma omp simd reduction(+ : ab, aa, bb)
  for (int64_t i = 0; i < count; ++i) {
    const double x = static_cast<double>(static_cast<Compute<T>>(a[i]));
    const double y = static_cast<double>(static_cast<Compute<T>>(b[i]));
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  sums[0] += ab;
  sums[1] += aa;
  sums[2] += bb;
}

// Per column over `rows` rows that lie `stride` apart: adds to ab, aa, bb [columns].
template <class T>
NEQ_TARGET void products_of_columns(const T* a, const T* b, int64_t rows, int64_t stride,
                                    int64_t columns, double* __restrict ab, double* __restrict aa,
                                    double* __restrict bb) {
  constexpr int64_t kRows = 4;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    const T* __restrict x = a + row * stride;
    const T* __restrict y = b + row * stride;
    for (int64_t c = 0; c < columns; ++c) {
      double sum_ab = ab[c], sum_aa = aa[c], sum_bb = bb[c];
      for (int64_t r = 0; r < kRows; ++r) {
        const double u = static_cast<double>(static_cast<Compute<T>>(x[r * stride + c]));
        const double v = static_cast<double>(static_cast<Compute<T>>(y[r * stride + c]));
        sum_ab += u * v;
        sum_aa += u * u;
        sum_bb += v * v;
      }
      ab[c] = sum_ab;
      aa[c] = sum_aa;
      bb[c] = sum_bb;
    }
  }
  for (; row < rows; ++row) {
    const T* __restrict x = a + row * stride;
    const T* __restrict y = b + row * stride;
    for (int64_t c = 0; c < columns; ++c) {
      const double u = static_cast<double>(static_cast<Compute<T>>(x[c]));
      const double v = static_cast<double>(static_cast<Compute<T>>(y[c]));
      ab[c] += u * v;
      aa[c] += u * u;
      bb[c] += v * v;
    }
  }
}

}  // namespace neq::NEQ_ISA
