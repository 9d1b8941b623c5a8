// Weight gradient of a 2d depthwise convolution: computed directly, for the active channels only.
#include "depthwise_wgrad.h"

#include <algorithm>
#include <vector>

#include "../conv/column_gather.h"
#include "../ops.h"
#include "../tensor/strides.h"
#include "band.h"
#include "in_place.h"

namespace neq {
namespace depthwise {
namespace {

Split nchw_parts(const ConvProblem& p) {
  // Each lane has a sum of every tap, and all of them are added up.
  constexpr int64_t kLeastPixels = 2048;
  const int64_t least_images = (kLeastPixels - 1) / (p.h.output * p.w.output) + 1;
  return parts_of(p.images, least_images, p.n, p.n * p.outputs() * p.taps());
}

Schedule nchw_schedule(const ConvProblem& p, int64_t threads) {
  return {nchw_parts(p), p.n, p.n * p.outputs() * p.taps(), threads};
}

template <class T>
void nchw(const ConvProblem& p, const T* grad, const T* input, Partial& partial) {
  using C = Compute<T>;
  const Split images = nchw_parts(p);
  const Schedule shares = nchw_schedule(p, torch::stable::get_num_threads());
  partial.resize(images.parts);
  const int64_t in_plane = p.h.input * p.w.input, out_plane = p.h.output * p.w.output;
  for_each_share(shares.shares(), [&](int64_t i) {
    const Share share = shares.share(i);
    Band<T> band(p, 1);
    const auto copy = [&](const T* from, int64_t from_row, int64_t column, int64_t stride, C* to,
                          int64_t to_row, int64_t rows, int64_t count) {
      kernels<T>().copy_rows(from + column, from_row, stride, to, to_row, rows, count);
    };
    Sums<T> sums(p.taps());
    const auto add = [&](int64_t part, int64_t slot) {
      const int64_t channel = p.active[slot];
      sums.clear();
      for (int64_t image = images.begin(part); image < images.end(part); ++image) {
        const T* dy = grad + (image * p.output_channels + channel) * out_plane;
        const T* x = input + (image * p.input_channels + channel / p.multiplier()) * in_plane;
        for (int64_t b = 0; b < band.bands(); ++b) {
          band.fill_input(b, x, p.w.input, copy);
          band.fill_grad(b, dy, p.w.output, copy);
          band.add(b, 0, sums);
        }
      }
      double* row = partial.fresh_row(part, slot);
      for (int64_t lane = 0; lane < Sums<T>::kLanes; ++lane) sums.add_lane(lane, row);
    };
    for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
      for (int64_t slot = share.vectors.begin; slot < share.vectors.end; ++slot) add(part, slot);
    }
  });
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
    const int64_t pixel_stride = stride * pixel_channels_;
    const ColumnGather gather = plan_.get(0, 0, far_ahead<T>(pixel_stride));
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

// The active channels, gathered pixel by pixel, in chunks of two vectors.
template <class T>
class Gathered {
 public:
  static constexpr int64_t kLanes = Band<T>::kLanes, kWidth = 2 * kLanes;

  explicit Gathered(const ConvProblem& p)
      : p_(p),
        chunks_((p.n - 1) / kWidth + 1),
        products_(chunks_ * kWidth * p.outputs() * p.taps()),
        bands_(Band<T>::bands(p, kWidth)),
        units_(parts_of(p.images * bands_, least_units(p, bands_), 2 * chunks_, products_)) {}

  Schedule schedule(int64_t threads) const { return {units_, chunks_, products_, threads}; }

  std::vector<int64_t> slots_of(int64_t chunk) const {
    std::vector<int64_t> slots;
    for (int64_t i = chunk * kWidth; i < std::min(p_.n, (chunk + 1) * kWidth); ++i) {
      slots.push_back(i);
    }
    return slots;
  }

  void add(const T* grad, const T* input, Partial& partial) const {
    std::vector<int64_t> sources(p_.n);
    for (int64_t i = 0; i < p_.n; ++i) sources[i] = p_.active[i] / p_.multiplier();
    std::vector<PixelCopy<T>> copy_dy, copy_x;
    for (int64_t first = 0; first < p_.n; first += kWidth) {
      copy_dy.emplace_back(p_.active + first, p_.n - first, p_.output_channels, kWidth);
      copy_x.emplace_back(sources.data() + first, p_.n - first, p_.input_channels, kWidth);
    }
    const Schedule shares = schedule(torch::stable::get_num_threads());
    partial.resize(units_.parts);
    for_each_share(shares.shares(), [&](int64_t i) {
      const Share share = shares.share(i);
      const Range chunks = share.vectors;
      const int64_t first = chunks.begin * kWidth, last = std::min(p_.n, chunks.end * kWidth);
      Band<T> band(p_, kWidth);
      LineVector<Sums<T>> sums((last - first - 1) / kLanes + 1, Sums<T>(p_.taps()));
      for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
        for (Sums<T>& of_vector : sums) of_vector.clear();
        for (int64_t unit = units_.begin(part); unit < units_.end(part); ++unit) {
          const int64_t image = unit / bands_, b = unit % bands_;
          const T* dy = grad + image * p_.h.output * p_.w.output * p_.output_channels;
          const T* x = input + image * p_.h.input * p_.w.input * p_.input_channels;
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            band.fill_input(b, x, p_.w.input * p_.input_channels, copy_x[chunk]);
            band.fill_grad(b, dy, p_.w.output * p_.output_channels, copy_dy[chunk]);
            for (int64_t v = 0; v < 2 && chunk * kWidth + v * kLanes < p_.n; ++v) {
              band.add(b, v * kLanes, sums[2 * (chunk - chunks.begin) + v]);
            }
          }
        }
        for (int64_t slot = first; slot < last; ++slot) {
          sums[(slot - first) / kLanes].add_lane(slot % kLanes, partial.fresh_row(part, slot));
        }
      }
    });
  }

 private:
  static int64_t least_units(const ConvProblem& p, int64_t bands) {
    return (kLeastPixels / 2 * bands - 1) / (p.h.output * p.w.output) + 1;
  }

  const ConvProblem& p_;
  int64_t chunks_, products_, bands_;
  Split units_;
};

// Calls f with what computes the wgrad in NHWC.
template <class T, class F>
void with_nhwc(const ConvProblem& p, const F& f) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    if (InPlace<T>::supports(p)) {
      const InPlace<T> in_place(p);
      if (in_place.is_cheaper()) return f(in_place);
    }
  }
  f(Gathered<T>(p));
}

}  // namespace
}  // namespace depthwise

void depthwise_wgrad_shares(const ConvProblem& p, bool channels_last, int64_t threads,
                            ShareTable& table) {
  using namespace depthwise;
  if (p.n == 0 || p.outputs() == 0) return;
  const Partial partial(p);
  const auto tell = [&](const Schedule& shares, const auto& slots_of) {
    constexpr int64_t kBytes = sizeof(double);
    for (int64_t i = 0; i < shares.shares(); ++i) {
      const Share share = shares.share(i);
      table.add_work(0, i, shares.products(i));
      for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
        for (int64_t v = share.vectors.begin; v < share.vectors.end; ++v) {
          for (const int64_t slot : slots_of(v)) {
            table.add_writes(0, i, {0, partial.place(part, slot) * kBytes, p.cells() * kBytes});
          }
        }
      }
    }
  };
  if (channels_last) {
    with_nhwc<float>(p, [&](const auto& nhwc) {
      tell(nhwc.schedule(threads), [&](int64_t v) { return nhwc.slots_of(v); });
    });
  } else {
    tell(nchw_schedule(p, threads), [](int64_t slot) { return std::vector<int64_t>{slot}; });
  }
}

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
    depthwise::Partial partial(p);
    if (n > 0 && dy.numel() > 0) {
      if (last) {
        depthwise::with_nhwc<T>(p, [&](const auto& nhwc) { nhwc.add(grad, data, partial); });
      } else {
        depthwise::nchw(p, grad, data, partial);
      }
    }
    const std::vector<double> total = partial.total();
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
