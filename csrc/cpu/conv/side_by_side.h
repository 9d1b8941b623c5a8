// Copies of some channels, side by side at every pixel, as they are multiplied.
#pragma once

#include <algorithm>

#include "../simd/kernels.h"
#include "../tensor/scratch.h"
#include "convolution.h"

namespace neq {

// Pixels of an image, from `first` on: `rows` times `columns` of them.
struct PixelGrid {
  int64_t first, rows, row_step, columns, column_step;
};

// How pixels make pairs: each with the one `next` behind it, or, where they are 2 `apart`, every
// other one.
struct Pairing {
  int64_t next, apart;

  int64_t elements(int64_t pixels) const { return divided_up(pixels, apart); }

  // Of so many pixels, those elements that have both; all where nothing is made of two.
  template <class P>
  int64_t whole(int64_t pixels) const {
    return kIsPair<P> ? elements(std::max<int64_t>(0, pixels - next)) : pixels;
  }
};

// to[i * n + c] is element i of planes[c][from : from + count], for c < n.
template <class T, class P>
void interleave_pixels(const T* const* planes, int64_t n, int64_t from, int64_t count, P* to,
                       const Pairing& pairs) {
  const auto interleave = direct_kernels<T, P>().interleave;
  const int64_t whole = pairs.whole<P>(count), rest = pairs.elements(count) - whole;
  interleave(planes, n, from, whole, to, n, pairs.next, pairs.apart);
  if (rest == 0) return;
  interleave(planes, n, from + whole * pairs.apart, rest, to + whole * n, n, 0, pairs.apart);
}

template <class T, class P>
class SideBySide {
 public:
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(P));

  SideBySide(const ConvProblem& p, const T* input, bool channels_last)
      : x_(input),
        channels_(p.input_channels),
        plane_(p.h.input * p.w.input),
        channels_last_(channels_last) {}

  const T* data() const { return x_; }

  // to[i * width + c] is channel first + c, c < width, of element i of the grid. The last pixels,
  // in NHWC of each row, make no pairs.
  void copy(int64_t image, int64_t first, const PixelGrid& grid, P* to, int64_t width,
            const Pairing& pairs) const {
    const T* pixels = x_ + image * plane_ * channels_;
    if (channels_last_) {
      pixels += grid.first * channels_ + first;
      for (int64_t row = 0; row < grid.rows; ++row) {
        copy_pixels(pixels, grid.column_step * channels_, grid.columns, to, width, pairs);
        pixels += grid.row_step * channels_;
        to += pairs.elements(grid.columns) * width;
      }
      return;
    }
    const T* planes[kMostInRegisters * kLanes];
    for (int64_t c = 0; c < width; ++c) planes[c] = pixels + (first + c) * plane_;
    int64_t from = grid.first;
    const int64_t count = grid.rows * grid.columns;
    if (grid.rows > 1 || grid.column_step > 1) {
      static thread_local Scratch<T> scratch;
      T* taken = scratch.at_least(width * count);
      for (int64_t row = 0; row < grid.rows; ++row, from += grid.row_step) {
        direct_kernels<T, P>().take_steps(planes[0] + from, plane_, grid.column_step,
                                          taken + row * grid.columns, count, width, grid.columns);
      }
      for (int64_t c = 0; c < width; ++c) planes[c] = taken + c * count;
      from = 0;
    }
    interleave_pixels<T, P>(planes, width, from, count, to, pairs);
  }

 private:
  void copy_pixels(const T* from, int64_t stride, int64_t count, P* to, int64_t width,
                   const Pairing& pairs) const {
    const int64_t step = pairs.apart * stride;
    const auto copy_some = [&](int64_t i, int64_t some, int64_t distance) {
      if (width == step) {
        copy_stretch(from + i * step, some * width, to + i * width, distance);
      } else {
        direct_kernels<T, P>().pack_pixels(from + i * step, step, width / kLanes, some,
                                           to + i * width, width, distance);
      }
    };
    const int64_t whole = pairs.whole<P>(count), rest = pairs.elements(count) - whole;
    copy_some(0, whole, pairs.next * stride);
    if (rest > 0) copy_some(whole, rest, 0);
  }

  static void copy_stretch(const T* from, int64_t count, P* to, int64_t distance) {
    if constexpr (std::is_same_v<T, P>) {
      std::copy_n(from, count, to);
    } else {
      const int64_t whole = count / kLanes * kLanes;
      direct_kernels<T, P>().pack_pixels(from, 0, whole / kLanes, 1, to, 0, distance);
      const T* rest = from + whole;
      direct_kernels<T, P>().interleave(&rest, 1, 0, count - whole, to + whole, 1, distance, 1);
    }
  }

  const T* x_;
  int64_t channels_, plane_;
  bool channels_last_;
};

}  // namespace neq
