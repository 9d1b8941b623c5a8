// The inner loops of the depthwise wgrad in NHWC, on operands where they lie. Included once per
// instruction set.

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

template <class C, int kTapRows, int kTapColumns>
NEQ_TARGET void correlate_pixels_tile(const PixelSteps& steps, const C* dy, const C* x,
                                      int64_t rows, int64_t columns, C* lanes) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  const int64_t tap_column = steps.tap_column;
  Vector total[kTapRows][kTapColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTapColumns; ++s) total[r][s] = Vector{};
  }
  // The longer loop is the inner one.
  const bool tall = rows > columns;
  const int64_t outer = tall ? columns : rows, inner = tall ? rows : columns;
  const int64_t dy_outer = tall ? steps.dy_column : steps.dy_row;
  const int64_t dy_inner = tall ? steps.dy_row : steps.dy_column;
  const int64_t x_outer = tall ? steps.x_column : steps.x_row;
  const int64_t x_inner = tall ? steps.x_row : steps.x_column;
  for (int64_t i = 0; i < outer; ++i, dy += dy_outer, x += x_outer) {
    const C* dy_at = dy;
    const C* x_at[kTapRows];
#pragma GCC unroll 8
    for (int r = 0; r < kTapRows; ++r) x_at[r] = x + r * steps.tap_row;
    for (int64_t left = inner; left > 0; --left) {
      const Vector d = load(dy_at);
      dy_at += dy_inner;
#pragma GCC unroll 8
      for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < kTapColumns; ++s) total[r][s] += d * load(x_at[r] + s * tap_column);
        x_at[r] += x_inner;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTapColumns; ++s) {
      // A sum of its own first: chains of additions stay short.
      C* to = lanes + r * steps.lanes_row + s * kLanes;
      const Vector sum = load(to) + total[r][s];
      std::memcpy(to, &sum, sizeof(sum));
    }
  }
}

// For [tap columns - 1][tap rows - 1], up to most_tap_rows().
template <class C>
constexpr CorrelatePixels<C> correlate_pixels[kMostTapColumns][kMostTapRows] = {
    {correlate_pixels_tile<C, 1, 1>, correlate_pixels_tile<C, 2, 1>,
     correlate_pixels_tile<C, 3, 1>},
    {correlate_pixels_tile<C, 1, 2>, correlate_pixels_tile<C, 2, 2>,
     correlate_pixels_tile<C, 3, 2>},
    {correlate_pixels_tile<C, 1, 3>, correlate_pixels_tile<C, 2, 3>,
     correlate_pixels_tile<C, 3, 3>},
    {correlate_pixels_tile<C, 1, 4>, correlate_pixels_tile<C, 2, 4>},
    {correlate_pixels_tile<C, 1, 5>, correlate_pixels_tile<C, 2, 5>},
    {correlate_pixels_tile<C, 1, 6>},
    {correlate_pixels_tile<C, 1, 7>},
};

}  // namespace neq::NEQ_ISA
