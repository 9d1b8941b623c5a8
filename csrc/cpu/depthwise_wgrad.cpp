// Weight gradient of a 2d depthwise convolution, computed directly and for the active channels
// only.
//
// A band of output rows is handled at a time: the input rows it needs are copied to scratch memory,
// zero-padded and with their rows and columns sorted by stride phase, so that every tap reads
// neighbouring vectors at a fixed offset. In NCHW the lanes of a vector are neighbouring columns,
// in NHWC they are channels.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "column_gather.h"
#include "kernels.h"
#include "ops.h"
#include "split.h"
#include "strides.h"

namespace neq {
namespace {

constexpr int64_t kScratchBytes = 96 * 1024;

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

struct Problem {
  int64_t images, input_channels, output_channels;
  Axis h, w;
  const int64_t* active;
  int64_t n;
  bool want_bias;

  int64_t taps() const { return h.kernel * w.kernel; }
  int64_t cells() const { return taps() + 1; }
  int64_t multiplier() const { return output_channels / input_channels; }
};

// Sums of one vector of channels (NHWC) or of one channel (NCHW): per tap, and last the bias. A
// lane adds up only so many products in its own precision before they go to double.
template <class T>
class Sums {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(C));
  static constexpr int64_t kMostVectors = 128;

  // Lane i adds to out[i * lane_stride + tap], for i < n_lanes; the bias comes after the taps.
  Sums(int64_t taps, double* out, int64_t lane_stride, int64_t n_lanes)
      : taps_(taps),
        lanes_(taps * kLanes, C(0)),
        out_(out),
        lane_stride_(lane_stride),
        n_lanes_(n_lanes) {}

  // [tap][lane], to add up to `vectors` more products to.
  C* lanes_for(int64_t vectors) {
    if (vectors_ + vectors > kMostVectors) flush();
    vectors_ += vectors;
    return lanes_.data();
  }

  double* bias_lanes() { return bias_; }

  void flush() {
    for (int64_t i = 0; i < n_lanes_; ++i) {
      for (int64_t tap = 0; tap < taps_; ++tap) {
        out_[i * lane_stride_ + tap] += static_cast<double>(lanes_[tap * kLanes + i]);
      }
      out_[i * lane_stride_ + taps_] += bias_[i];
    }
    std::fill(lanes_.begin(), lanes_.end(), C(0));
    std::fill_n(bias_, kLanes, 0.0);
    vectors_ = 0;
  }

 private:
  int64_t taps_;
  std::vector<C> lanes_;
  double bias_[kLanes] = {};
  int64_t vectors_ = 0;
  double* out_;
  int64_t lane_stride_, n_lanes_;
};

// The scratch copy of one band. `width` elements stand side by side at
// each pixel: 1 in NCHW, some channels in NHWC.
template <class T>
class Band {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(C));

  Band(const Problem& problem, int64_t width)
      : p_(problem), k_(kernels<T>()), width_(width), in_columns_(width == 1) {
    columns_ = in_columns_ ? (p_.w.output + kLanes - 1) / kLanes : p_.w.output;
    const int64_t row_elements =
        (p_.w.output + p_.w.max_shift()) * width_ * p_.h.stride * p_.w.stride;
    const int64_t affordable =
        kScratchBytes / (row_elements * static_cast<int64_t>(sizeof(C))) - p_.h.max_shift();
    height_ = std::clamp<int64_t>(affordable, 1, p_.h.output);
    x_row_ = (p_.w.output + p_.w.max_shift()) * width_;
    x_phase_ = (height_ + p_.h.max_shift()) * x_row_;
    dy_row_ = in_columns_ ? columns_ * kLanes : columns_ * width_;
    // Whole vectors are read and written at the end of the last row.
    x_ = aligned_zeros(x_memory_, x_phase_ * p_.h.stride * p_.w.stride + 2 * kLanes);
    dy_ = aligned_zeros(dy_memory_, height_ * dy_row_ + 2 * kLanes);
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      for (int64_t s = 0; s < p_.w.kernel; ++s) {
        offsets_.push_back(phase_at(p_.h.phase(r), p_.w.phase(s)) + p_.h.shift(r) * x_row_ +
                           p_.w.shift(s) * width_);
      }
    }
  }

  int64_t bands() const { return (p_.h.output + height_ - 1) / height_; }

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
  static C* aligned_zeros(std::vector<C>& memory, int64_t count) {
    constexpr size_t kCacheLine = 64;
    memory.assign(count + kCacheLine / sizeof(C), C(0));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (kCacheLine - address % kCacheLine) % kCacheLine / sizeof(C);
  }

  int64_t rows_of(int64_t band) const { return std::min(height_, p_.h.output - band * height_); }
  int64_t phase_at(int64_t v, int64_t u) const { return (v * p_.w.stride + u) * x_phase_; }

  const Problem& p_;
  const Kernels<T>& k_;
  int64_t width_;
  bool in_columns_;
  int64_t columns_, height_, x_row_, x_phase_, dy_row_;
  std::vector<C> x_memory_, dy_memory_;
  C *x_, *dy_;
  std::vector<int64_t> offsets_;
};

// Both functions fill partial[part][n][taps + 1], bias last, and return the number of parts.

template <class T>
std::vector<double> nchw(const Problem& p, const T* grad, const T* input, int64_t& parts) {
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
      Sums<T> sums(p.taps(), partial.data() + item * p.cells(), 0, Sums<T>::kLanes);
      for (int64_t image = images.begin(part); image < images.end(part); ++image) {
        const T* dy = grad + (image * p.output_channels + channel) * out_plane;
        const T* x = input + (image * p.input_channels + channel / p.multiplier()) * in_plane;
        for (int64_t b = 0; b < band.bands(); ++b) {
          band.fill_input(b, x, p.w.input, copy);
          band.fill_grad(b, dy, p.w.output, copy);
          band.add(b, 0, sums);
        }
      }
      sums.flush();
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
std::vector<double> nhwc(const Problem& p, const T* grad, const T* input, int64_t& parts) {
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
      std::vector<Sums<T>> sums;
      for (int64_t first = 0; first < p.n; first += kLanes) {
        sums.emplace_back(p.taps(), partial.data() + (part * p.n + first) * p.cells(), p.cells(),
                          std::min(kLanes, p.n - first));
      }
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
      for (Sums<T>& each : sums) each.flush();
    }
  });
  return partial;
}

Axis checked_axis(const Tensor& grad, const Tensor& input, const std::vector<int64_t>& weight_shape,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, int64_t i) {
  const Axis axis{input.size(2 + i), grad.size(2 + i), weight_shape[2 + i],
                  stride[i],         padding[i],       dilation[i]};
  require(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.padding >= 0,
          "kernel, stride, dilation: expected at least 1, and padding at least 0, got ",
          axis.kernel, ", ", axis.stride, ", ", axis.dilation, " and ", axis.padding);
  const int64_t reach = axis.input + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
  const int64_t output = reach < 0 ? 0 : reach / axis.stride + 1;
  require(axis.output == output, "grad_output: expected size ", output, " in dimension ", 2 + i,
          ", got ", axis.output);
  return axis;
}

}  // namespace

std::tuple<Tensor, Tensor> depthwise_wgrad(const Tensor& grad_output, const Tensor& input,
                                           const std::vector<int64_t>& weight_shape,
                                           const std::vector<int64_t>& stride,
                                           const std::vector<int64_t>& padding,
                                           const std::vector<int64_t>& dilation,
                                           const Tensor& order, int64_t n, bool want_bias) {
  require_cpu(grad_output, "grad_output");
  require_cpu(input, "input");
  require_same_dtype(grad_output, input, "grad_output");
  require(grad_output.dim() == 4 && input.dim() == 4 && weight_shape.size() == 4,
          "grad_output, input, weight: expected 4 dimensions, got ", grad_output.dim(), ", ",
          input.dim(), " and ", weight_shape.size());
  require(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "stride, padding, dilation: expected 2 values each, got ", stride.size(), ", ",
          padding.size(), " and ", dilation.size());
  const int64_t in = input.size(1), out = grad_output.size(1);
  require(in > 0 && out % in == 0 && weight_shape[0] == out && weight_shape[1] == 1,
          "weight: expected (", out, ", 1, kH, kW) with a multiple of ", in, " filters, got ",
          weight_shape[0], " filters of ", weight_shape[1], " channels");
  require(grad_output.size(0) == input.size(0), "grad_output: expected batch ", input.size(0),
          ", got ", grad_output.size(0));
  Problem p{};
  p.images = input.size(0);
  p.input_channels = in;
  p.output_channels = out;
  p.h = checked_axis(grad_output, input, weight_shape, stride, padding, dilation, 0);
  p.w = checked_axis(grad_output, input, weight_shape, stride, padding, dilation, 1);
  p.active = checked_order(order, n, out);
  p.n = n;
  p.want_bias = want_bias;

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
          last ? nhwc(p, grad, data, parts) : nchw(p, grad, data, parts);
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
