// Direct depthwise wgrad by way of scratch memory.
//
// A band of output rows is handled at a time: the input rows it needs are copied to scratch memory,
// zero-padded and with their rows and columns sorted by stride phase, so that every tap reads
// neighbouring vectors at a fixed offset. In NCHW the lanes of a vector are neighbouring columns,
// in NHWC they are channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../conv/convolution.h"
#include "../simd/kernels.h"
#include "sums.h"

namespace neq::depthwise {

constexpr int64_t kScratchBytes = 96 * 1024;

// The scratch copy of one band; a thread has one at a time. `width` elements stand side by side at
// each pixel: 1 in NCHW, some channels in NHWC.
template <class T>
class Band {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(C));

  Band(const ConvProblem& problem, int64_t width)
      : p_(problem), k_(kernels<T>()), width_(width), in_columns_(width == 1) {
    columns_ = in_columns_ ? (p_.w.output + kLanes - 1) / kLanes : p_.w.output;
    height_ = height(p_, width);
    x_row_ = (p_.w.output + p_.w.max_shift()) * width_;
    x_phase_ = (height_ + p_.h.max_shift()) * x_row_;
    dy_row_ = in_columns_ ? columns_ * kLanes : columns_ * width_;
    // Whole vectors are read and written at the end of the last row.
    static thread_local Scratch<C> scratch_of_x, scratch_of_dy;
    x_ = zeros(scratch_of_x, x_phase_ * p_.h.stride * p_.w.stride + 2 * kLanes);
    dy_ = zeros(scratch_of_dy, height_ * dy_row_ + 2 * kLanes);
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      for (int64_t s = 0; s < p_.w.kernel; ++s) {
        offsets_.push_back(phase_at(p_.h.phase(r), p_.w.phase(s)) + p_.h.shift(r) * x_row_ +
                           p_.w.shift(s) * width_);
      }
    }
  }

  int64_t bands() const { return (p_.h.output - 1) / height_ + 1; }

  static int64_t bands(const ConvProblem& p, int64_t width) {
    return (p.h.output - 1) / height(p, width) + 1;
  }

  // copy(from, from_row, pixel, stride, to, to_row, rows, count) copies `rows` rows of `count`
  // pixels, from `pixel` on and `stride` apart.
  template <class Copy>
  void fill_input(int64_t band, const T* image, int64_t row_stride, const Copy& copy) {
    const int64_t top = band * height_;
    for (int64_t v = 0; v < p_.h.stride; ++v) {
      if (p_.h.reach(v) < 0) continue;
      const int64_t end = top + rows_of(band) + p_.h.reach(v);
      const int64_t first = std::clamp(p_.h.first(v), top, end);
      const int64_t last = std::clamp(p_.h.last(v), first, end);
      for (int64_t u = 0; u < p_.w.stride; ++u) {
        const int64_t left = p_.w.first(u), count = p_.w.last(u) - left;
        if (count <= 0) continue;
        C* phase = x_ + phase_at(v, u);
        std::fill_n(phase, (first - top) * x_row_, C(0));
        std::fill_n(phase + (last - top) * x_row_, (end - last) * x_row_, C(0));
        if (first == last) continue;
        copy(image + p_.h.position(first, v) * row_stride, p_.h.stride * row_stride,
             p_.w.position(left, u), p_.w.stride, phase + (first - top) * x_row_ + left * width_,
             x_row_, last - first, count);
      }
    }
  }

  template <class Copy>
  void fill_grad(int64_t band, const T* image, int64_t row_stride, const Copy& copy) {
    copy(image + band * height_ * row_stride, row_stride, 0, 1, dy_, dy_row_, rows_of(band),
         p_.w.output);
  }

  // Adds the band to `sums`; `lane` picks a vector of each pixel.
  void add(int64_t band, int64_t lane, Sums<T>& sums) const {
    const int64_t step = in_columns_ ? kLanes : width_, rows = rows_of(band);
    const int64_t most_columns = std::min(columns_, Sums<T>::kMostVectors);
    const int64_t most_rows = Sums<T>::kMostVectors / most_columns;
    for (int64_t row = 0; row < rows; row += most_rows) {
      for (int64_t column = 0; column < columns_; column += most_columns) {
        const Correlation<C> c{dy_ + lane + row * dy_row_ + column * step,
                               dy_row_,
                               x_ + lane + row * x_row_ + column * step,
                               x_row_,
                               std::min(most_rows, rows - row),
                               std::min(most_columns, columns_ - column),
                               step};
        k_.correlate(c, offsets_.data(), p_.taps(), sums.lanes_for(c.rows * c.columns));
        if (p_.want_bias) k_.sum(c, sums.bias_lanes());
      }
    }
  }

 private:
  static int64_t height(const ConvProblem& p, int64_t width) {
    const int64_t row_elements = (p.w.output + p.w.max_shift()) * width * p.h.stride * p.w.stride;
    const int64_t affordable =
        kScratchBytes / (row_elements * static_cast<int64_t>(sizeof(C))) - p.h.max_shift();
    return std::clamp<int64_t>(affordable, 1, p.h.output);
  }

  static C* zeros(Scratch<C>& scratch, int64_t count) {
    return std::fill_n(scratch.at_least(count), count, C(0)) - count;
  }

  int64_t rows_of(int64_t band) const { return std::min(height_, p_.h.output - band * height_); }
  int64_t phase_at(int64_t v, int64_t u) const { return (v * p_.w.stride + u) * x_phase_; }

  const ConvProblem& p_;
  const Kernels<T>& k_;
  int64_t width_;
  bool in_columns_;
  int64_t columns_, height_, x_row_, x_phase_, dy_row_;
  C *x_, *dy_;
  std::vector<int64_t> offsets_;
};

}  // namespace neq::depthwise
