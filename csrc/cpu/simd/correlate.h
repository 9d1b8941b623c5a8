// The inner loops of the direct depthwise wgrad. Included once per instruction set.

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

template <class C, int kTaps>
NEQ_TARGET void correlate_taps(const Correlation<C>& c, const int64_t* offsets, C* sums) {
  using Vector = typename Lanes<C>::Vector;
  Vector total[kTaps];
  const C* x[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    total[t] = Vector{};
    x[t] = c.x + offsets[t];
  }
  for (int64_t row = 0; row < c.rows; ++row) {
    const C* dy = c.dy + row * c.dy_row;
    int64_t at = row * c.x_row;
    for (int64_t column = 0; column < c.columns; ++column) {
      const Vector d = load(dy);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) total[t] += d * load(x[t] + at);
      dy += c.step;
      at += c.step;
    }
  }
  // A sum of its own first: chains of additions stay short.
  for (int t = 0; t < kTaps; ++t) {
    const Vector sum = load(sums + t * Lanes<C>::count) + total[t];
    std::memcpy(sums + t * Lanes<C>::count, &sum, sizeof(sum));
  }
}

// sums[tap][lane] += sum over rows and columns of dy * x shifted by the tap's offset. A few taps at
// a time, so that their sums stay in registers.
template <class C>
NEQ_TARGET void correlate(const Correlation<C>& c, const int64_t* offsets, int64_t taps, C* sums) {
  using Function = void (*)(const Correlation<C>&, const int64_t*, C*);
  constexpr int64_t kMost = 9;
  static constexpr Function of_size[kMost + 1] = {
      nullptr,
      correlate_taps<C, 1>,
      correlate_taps<C, 2>,
      correlate_taps<C, 3>,
      correlate_taps<C, 4>,
      correlate_taps<C, 5>,
      correlate_taps<C, 6>,
      correlate_taps<C, 7>,
      correlate_taps<C, 8>,
      correlate_taps<C, 9>,
  };
  for (int64_t parts = (taps + kMost - 1) / kMost; parts > 0; --parts) {
    const int64_t size = (taps + parts - 1) / parts;
    of_size[size](c, offsets, sums);
    offsets += size;
    sums += size * Lanes<C>::count;
    taps -= size;
  }
}

// totals[lane] += sum of dy over rows and columns.
template <class C>
NEQ_TARGET void sum(const Correlation<C>& c, double* __restrict totals) {
  constexpr int64_t kLanes = Lanes<C>::count;
  double total[kLanes] = {};
  for (int64_t row = 0; row < c.rows; ++row) {
    const C* dy = c.dy + row * c.dy_row;
    for (int64_t column = 0; column < c.columns; ++column, dy += c.step) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += static_cast<double>(dy[lane]);
    }
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) totals[lane] += total[lane];
}

// Neighbouring elements by whole vectors; the last vector overlaps the one before.
template <class C>
NEQ_TARGET inline void copy_row(const C* from, int64_t count, C* to) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(C);
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + kLanes < count; i += kLanes) {
    std::memcpy(to + i, from + i, kVectorBytes);
  }
  std::memcpy(to + count - kLanes, from + count - kLanes, kVectorBytes);
}

// Every stride-th element of each row, converted.
template <class T, class C>
NEQ_TARGET void copy_rows(const T* __restrict from, int64_t from_row, int64_t stride,
                          C* __restrict to, int64_t to_row, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
    if (stride == 1) {
      if constexpr (std::is_same_v<T, C>) {
        copy_row(from, count, to);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(from[i]);
      }
    } else if (stride == 2) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(from[2 * i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(from[stride * i]);
    }
  }
}

}  // namespace neq::NEQ_ISA
