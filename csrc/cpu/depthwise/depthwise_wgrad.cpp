// Weight gradient of a 2d depthwise convolution: computed directly, for the active channels only.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../conv/column_gather.h"
#include "../ops.h"
#include "../tensor/split.h"
#include "../tensor/strides.h"
#include "band.h"
#include "in_place.h"

namespace neq {
namespace depthwise {
namespace {

// Both functions give partial[part][n][taps + 1], bias last, and set the number of parts.

template <class T>
std::vector<double> nchw(const ConvProblem& p, const T* grad, const T* input, int64_t& parts) {
  using C = Compute<T>;
  const Split images(p.images, (63 + p.n) / p.n, 1);
  parts = images.parts;
  std::vector<double> partial(parts * p.n * p.cells(), 0.0);
  const int64_t in_plane = p.h.input * p.w.input, out_plane = p.h.output * p.w.output;
  torch::stable::parallel_for(0, parts * p.n, 1, [&](int64_t begin, int64_t end) {
    Band<T> band(p, 1);
    const auto copy = [&](const T* from, int64_t from_row, int64_t column, int64_t stride, C* to,
                          int64_t to_row, int64_t rows, int64_t count) {
      kernels<T>().copy_rows(from + column, from_row, stride, to, to_row, rows, count);
    };
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / p.n, channel = p.active[item % p.n];
      Sums<T> sums(p.taps());
      for (int64_t image = images.begin(part); image < images.end(part); ++image) {
        const T* dy = grad + (image * p.output_channels + channel) * out_plane;
        const T* x = input + (image * p.input_channels + channel / p.multiplier()) * in_plane;
        for (int64_t b = 0; b < band.bands(); ++b) {
          band.fill_input(b, x, p.w.input, copy);
          band.fill_grad(b, dy, p.w.output, copy);
          band.add(b, 0, sums);
        }
      }
      for (int64_t lane = 0; lane < Sums<T>::kLanes; ++lane) {
        sums.add_lane(lane, partial.data() + item * p.cells());
      }
    }
  });
  return partial;
}

// Copies some channels of each pixel.
template <class T>
class PixelCopy {
 public:
  // `left` channels are still to come, this chunk included.
  PixelCopy(const int64_t* channels, int64_t left, int64_t pixel_channels, int64_t width)
      : plan_(channels, std::min(left, width), pixel_channels, sizeof(T),
              std::clamp<int64_t>(left - width, 0, width)),
        pixel_channels_(pixel_channels),
        width_(width) {}

  void operator()(const T* from, int64_t from_row, int64_t pixel, int64_t stride, Compute<T>* to,
                  int64_t to_row, int64_t rows, int64_t count) const {
    const ColumnGather gather = plan_.get();
    const int64_t pixel_stride = stride * pixel_channels_;
    from += pixel * pixel_channels_;
    for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
      if constexpr (sizeof(T) == 2) {
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < gather.n; ++c) {
            to[i * width_ + c] = static_cast<float>(from[i * pixel_stride + gather.columns[c]]);
          }
        }
      } else {
        using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
        gather_columns_kernel<Word>()(gather, reinterpret_cast<const Word*>(from), pixel_stride,
                                      reinterpret_cast<Word*>(to), width_, count);
      }
    }
  }

 private:
  ColumnGatherPlan plan_;
  int64_t pixel_channels_, width_;
};

template <class T>
std::vector<double> nhwc(const ConvProblem& p, const T* grad, const T* input, int64_t& parts) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    if (InPlace<T>::supports(p)) {
      const InPlace<T> in_place(p);
      if (in_place.is_cheaper()) return in_place.partial(grad, input, parts);
    }
  }
  constexpr int64_t kLanes = Band<T>::kLanes, kWidth = 2 * kLanes;
  const int64_t chunks = (p.n + kWidth - 1) / kWidth;
  std::vector<int64_t> sources(p.n);
  for (int64_t i = 0; i < p.n; ++i) sources[i] = p.active[i] / p.multiplier();
  std::vector<PixelCopy<T>> copy_dy, copy_x;
  for (int64_t first = 0; first < p.n; first += kWidth) {
    copy_dy.emplace_back(p.active + first, p.n - first, p.output_channels, kWidth);
    copy_x.emplace_back(sources.data() + first, p.n - first, p.input_channels, kWidth);
  }

  const int64_t bands = Band<T>(p, kWidth).bands();
  const Split units(p.images * bands, 16, 1);
  parts = units.parts;
  std::vector<double> partial(parts * p.n * p.cells(), 0.0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Band<T> band(p, kWidth);
    for (int64_t part = begin; part < end; ++part) {
      std::vector<Sums<T>> sums((p.n - 1) / kLanes + 1, Sums<T>(p.taps()));
      for (int64_t unit = units.begin(part); unit < units.end(part); ++unit) {
        const int64_t image = unit / bands, b = unit % bands;
        const T* dy = grad + image * p.h.output * p.w.output * p.output_channels;
        const T* x = input + image * p.h.input * p.w.input * p.input_channels;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          band.fill_input(b, x, p.w.input * p.input_channels, copy_x[chunk]);
          band.fill_grad(b, dy, p.w.output * p.output_channels, copy_dy[chunk]);
          for (int64_t v = 0; v < 2 && chunk * kWidth + v * kLanes < p.n; ++v) {
            band.add(b, v * kLanes, sums[2 * chunk + v]);
          }
        }
      }
      for (int64_t i = 0; i < p.n; ++i) {
        sums[i / kLanes].add_lane(i % kLanes, partial.data() + (part * p.n + i) * p.cells());
      }
    }
  });
  return partial;
}

}  // namespace
}  // namespace depthwise

std::tuple<Tensor, Tensor> depthwise_wgrad(const Tensor& grad_output, const Tensor& input,
                                           const std::vector<int64_t>& weight_shape,
                                           const std::vector<int64_t>& stride,
                                           const std::vector<int64_t>& padding,
                                           const std::vector<int64_t>& dilation,
                                           const Tensor& order, int64_t n, bool want_bias) {
  const ConvProblem p = checked_problem(grad_output, input, weight_shape, stride, padding, dilation,
                                        order, n, want_bias);
  require(weight_shape[1] == 1 && p.output_channels % p.input_channels == 0, "weight: expected (",
          p.output_channels, ", 1, kH, kW) with a multiple of ", p.input_channels, " filters, got ",
          weight_shape[0], " filters of ", weight_shape[1], " channels");
  const std::vector<int64_t> channels_first{0, 1, 2, 3}, channels_last{0, 2, 3, 1};
  const bool last = !is_dense(input, channels_first) && is_dense(input, channels_last);
  const Tensor x = in_order(input, last ? channels_last : channels_first);
  const Tensor dy = in_order(grad_output, last ? channels_last : channels_first);

  Tensor rows = empty_in_order({n, 1, p.h.kernel, p.w.kernel}, channels_first, x.scalar_type());
  Tensor bias = empty_in_order({want_bias ? n : 0}, {0}, x.scalar_type());
  dispatch_floating(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const T* grad = static_cast<const T*>(dy.const_data_ptr());
    const T* data = static_cast<const T*>(x.const_data_ptr());
    const int64_t cells = p.cells();
    std::vector<double> total(n * cells, 0.0);
    if (n > 0 && dy.numel() > 0) {
      int64_t parts = 0;
      const std::vector<double> partial =
          last ? depthwise::nhwc(p, grad, data, parts) : depthwise::nchw(p, grad, data, parts);
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t i = 0; i < n * cells; ++i) total[i] += partial[part * n * cells + i];
      }
    }
    T* weight_rows = static_cast<T*>(rows.mutable_data_ptr());
    T* bias_rows = static_cast<T*>(bias.mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t < p.taps(); ++t) {
        weight_rows[i * p.taps() + t] =
            static_cast<T>(static_cast<Compute<T>>(total[i * cells + t]));
      }
      if (want_bias)
        bias_rows[i] = static_cast<T>(static_cast<Compute<T>>(total[i * cells + p.taps()]));
    }
  });
  return {rows, bias};
}

}  // namespace neq
