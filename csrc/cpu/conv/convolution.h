// The shape of a 2d convolution.
#pragma once

#include <algorithm>
#include <vector>

#include "../tensor/checks.h"

namespace neq {

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One dimension of the convolution.
struct Axis {
  int64_t input, output, kernel, stride, padding, dilation;

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t max_shift() const { return shift(kernel - 1); }
  // How far beyond the outputs the taps of this phase reach; -1 when no tap has this phase.
  int64_t reach(int64_t of_phase) const {
    int64_t reach = -1;
    for (int64_t tap = 0; tap < kernel; ++tap) {
      if (phase(tap) == of_phase) reach = shift(tap);
    }
    return reach;
  }
  // Outputs [begin(tap), end(tap)) read inside the input.
  int64_t begin(int64_t tap) const {
    return std::max<int64_t>(0, (padding - tap * dilation + stride - 1) / stride);
  }
  int64_t end(int64_t tap) const {
    const int64_t inside = input - 1 + padding - tap * dilation;
    return inside < 0 ? 0 : std::min(inside / stride + 1, output);
  }
  // Input position of element `index` of a phase.
  int64_t position(int64_t index, int64_t of_phase) const {
    return index * stride + of_phase - padding;
  }
  // Elements [first, last) of a phase lie inside the input and are read by some tap.
  int64_t first(int64_t of_phase) const {
    return std::max<int64_t>(0, (padding - of_phase + stride - 1) / stride);
  }
  int64_t last(int64_t of_phase) const {
    const int64_t inside = input - 1 + padding - of_phase;
    const int64_t used = output + reach(of_phase);
    return reach(of_phase) < 0 || inside < 0 ? 0 : std::min(inside / stride + 1, used);
  }
};

// The weight gradient of the `n` active ones of the output channels of a 2d convolution.
struct ConvProblem {
  int64_t images, input_channels, output_channels;
  Axis h, w;
  const int64_t* active;
  int64_t n;
  bool want_bias;

  int64_t taps() const { return h.kernel * w.kernel; }
  int64_t outputs() const { return images * h.output * w.output; }  // of a channel
  int64_t cells() const { return taps() + 1; }
  int64_t multiplier() const { return output_channels / input_channels; }
};

// Groups are not looked at: weight_shape[1] is not checked.
ConvProblem checked_problem(const Tensor& grad_output, const Tensor& input,
                            const std::vector<int64_t>& weight_shape,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, const Tensor& order, int64_t n,
                            bool want_bias);

// A 1x1 convolution is a product of matrices: the pixels of an image, or of all images, form a row.
void flatten_pixels(ConvProblem& p, bool channels_last);

}  // namespace neq
