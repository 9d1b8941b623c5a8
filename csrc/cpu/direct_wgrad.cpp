#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "column_gather.h"
#include "kernels.h"
#include "split.h"

namespace neq {
namespace {

constexpr int64_t kPixelsPerBand = 256;        // summed in registers before they join the others
constexpr int64_t kProductsPerItem = 1 << 17;  // of dy and x: what one parallel item is worth
constexpr int64_t kMostItems = 64;

// The active channels of dy, side by side at every pixel.
template <class T>
struct PackedGrad {
  const T* data;
  int64_t pixel_stride;
  std::unique_ptr<T[]> memory;
};

template <class T>
PackedGrad<T> pack_grad(const ConvProblem& p, const T* grad, bool channels_last) {
  const int64_t plane = p.h.output * p.w.output, n = p.n;
  bool adjacent = true;
  for (int64_t i = 1; i < n; ++i) adjacent = adjacent && p.active[i] == p.active[0] + i;
  if (channels_last && adjacent) return {grad + p.active[0], p.output_channels, nullptr};
  std::unique_ptr<T[]> memory(new T[p.images * plane * n]);
  T* to = memory.get();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / n);
  if (channels_last) {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const ColumnGatherPlan plan(p.active, n, p.output_channels, sizeof(T));
    torch::stable::parallel_for(0, p.images * plane, grain, [&](int64_t begin, int64_t end) {
      gather_columns_kernel<Word>()(
          plan.get(), reinterpret_cast<const Word*>(grad + begin * p.output_channels),
          p.output_channels, reinterpret_cast<Word*>(to + begin * n), n, end - begin);
    });
    return {to, n, std::move(memory)};
  }
  torch::stable::parallel_for(
      0, p.images, (grain + plane - 1) / plane, [&](int64_t begin, int64_t end) {
        std::vector<const T*> planes(n);
        for (int64_t image = begin; image < end; ++image) {
          for (int64_t i = 0; i < n; ++i) {
            planes[i] = grad + (image * p.output_channels + p.active[i]) * plane;
          }
          kernels<T>().interleave(planes.data(), n, 0, plane, to + image * plane * n, n);
        }
      });
  return {to, n, std::move(memory)};
}

// A 1x1 convolution is a product of matrices: the pixels of an image, or of all images, form a row.
void flatten_pixels(ConvProblem& p, bool channels_last) {
  for (const Axis* axis : {&p.h, &p.w}) {
    if (axis->kernel != 1 || axis->stride != 1 || axis->padding != 0) return;
  }
  int64_t pixels = p.h.output * p.w.output;
  if (channels_last) {
    pixels *= p.images;
    p.images = 1;
  }
  p.h = {pixels, pixels, 1, 1, 0, 1};
  p.w = {1, 1, 1, 1, 0, 1};
}

// Some vectors of channels. Where the last tile would pass the end it begins earlier, and leaves
// `skip` lanes out.
struct Tile {
  int64_t first, vectors, skip;
};

std::vector<Tile> channel_tiles(int64_t channels, int64_t lanes, int64_t n) {
  const int64_t widest = n <= 3 ? 4 : (n == 4 ? 3 : 2);
  std::vector<Tile> tiles;
  for (int64_t c = 0; c < channels;) {
    const int64_t left = channels - c;
    if (left < lanes) {
      tiles.push_back({channels - lanes, 1, lanes - left});
      break;
    }
    const int64_t vectors = std::min(widest, left / lanes);
    tiles.push_back({c, vectors, 0});
    c += vectors * lanes;
  }
  return tiles;
}

// Adds up dy[n] x[channels], pixel by pixel, for every tap of the kernel.
//
// The operands are read where they lie when the channels are innermost. Else each tile's channels
// are first put side by side, in a panel. With fewer channels than lanes the taps of a kernel row
// take part as channels: they are neighbours in a zero-padded copy of the input's rows.
template <class T>
class Direct {
 public:
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

  Direct(const ConvProblem& p, const PackedGrad<T>& dy, const T* input, bool channels_last)
      : p_(p),
        dy_(dy),
        x_(input),
        channels_last_(channels_last),
        rows_of_taps_(p.input_channels < kLanes && p.w.dilation == 1),
        panels_(!channels_last || p.input_channels < kLanes),
        channels_(p.input_channels * (rows_of_taps_ ? p.w.kernel : 1)),
        padded_(std::max(channels_, kLanes)),
        column_taps_(rows_of_taps_ ? 1 : p.w.kernel),
        tiles_(channel_tiles(padded_, kLanes, p.n)),
        band_rows_(
            std::clamp<int64_t>(kPixelsPerBand / std::max<int64_t>(1, p.w.output), 1, p.h.output)),
        bands_((p.h.output + band_rows_ - 1) / band_rows_) {}

  DirectWgrad<T> run() {
    const double products = static_cast<double>(p_.n) * static_cast<double>(channels_) *
                            static_cast<double>(p_.h.kernel * column_taps_) *
                            static_cast<double>(p_.images * p_.h.output * p_.w.output);
    const auto most = static_cast<int64_t>(
        std::clamp(products / kProductsPerItem, 1.0, static_cast<double>(kMostItems)));
    const Split chunks(static_cast<int64_t>(tiles_.size()), most, 1);
    const Split units(p_.images * bands_, std::clamp<int64_t>(most / chunks.parts, 1, 16), 1);
    const int64_t size = p_.n * p_.h.kernel * column_taps_ * padded_;
    std::vector<T> sums(units.parts * size);
    std::vector<double> bias(p_.want_bias ? units.parts * p_.n : 0);
    torch::stable::parallel_for(0, units.parts * chunks.parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> panel;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item / chunks.parts, chunk = item % chunks.parts;
        for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
          for (int64_t unit = units.begin(part); unit < units.end(part); ++unit) {
            add(unit, tiles_[t], panel, sums.data() + part * size);
            if (p_.want_bias && t == 0) add_bias(unit, bias.data() + part * p_.n);
          }
        }
      }
    });
    for (int64_t part = 1; part < units.parts; ++part) {
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
      for (int64_t i = 0; p_.want_bias && i < p_.n; ++i) bias[i] += bias[part * p_.n + i];
    }
    bias.resize(p_.want_bias ? p_.n : 0);
    return {std::move(sums), p_.h.kernel * column_taps_, channels_, padded_, std::move(bias)};
  }

 private:
  int64_t first_row(int64_t unit) const { return unit % bands_ * band_rows_; }
  int64_t end_row(int64_t unit) const {
    return std::min(p_.h.output, first_row(unit) + band_rows_);
  }
  const T* grad_at(int64_t image, int64_t row) const {
    return dy_.data + (image * p_.h.output + row) * p_.w.output * dy_.pixel_stride;
  }

  // Adds one band of one image to sums[tap][n][channel], for the channels of one tile.
  void add(int64_t unit, const Tile& tile, std::vector<T>& panel, T* sums) const {
    const int64_t image = unit / bands_, top = first_row(unit), bottom = end_row(unit);
    // Pixels of x: those of a row lie `pixel` apart and begin at column -`left`.
    int64_t pixel = p_.input_channels, row = p_.w.input * pixel, left = 0;
    const T* x = x_ + image * p_.h.input * row + tile.first;
    if (panels_) {
      const int64_t begin = std::max<int64_t>(0, top * p_.h.stride - p_.h.padding);
      const int64_t last =
          (bottom - 1) * p_.h.stride - p_.h.padding + (p_.h.kernel - 1) * p_.h.dilation;
      const int64_t end = std::clamp(last + 1, begin, p_.h.input);
      if (rows_of_taps_) {
        left = p_.w.padding;
        row = ((p_.w.output - 1) * p_.w.stride + p_.w.kernel) * pixel;
        x = fill_rows_of_taps(panel, image, begin, end, row) + tile.first;
      } else {
        pixel = tile.vectors * kLanes;
        row = p_.w.input * pixel;
        x = fill_panel(panel, image, tile, begin, end);
      }
      x -= begin * row;
    }
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      const int64_t p0 = std::max(top, p_.h.begin(r)), p1 = std::min(bottom, p_.h.end(r));
      if (p0 >= p1) continue;
      const int64_t y0 = p0 * p_.h.stride - p_.h.padding + r * p_.h.dilation;
      for (int64_t s = 0; s < column_taps_; ++s) {
        const int64_t q0 = rows_of_taps_ ? 0 : p_.w.begin(s);
        const int64_t q1 = rows_of_taps_ ? p_.w.output : p_.w.end(s);
        if (q0 >= q1) continue;
        const int64_t x0 = q0 * p_.w.stride - p_.w.padding + s * p_.w.dilation + left;
        OuterProduct<T> o{grad_at(image, p0) + q0 * dy_.pixel_stride,
                          p_.w.output * dy_.pixel_stride,
                          dy_.pixel_stride,
                          x + y0 * row + x0 * pixel,
                          p_.h.stride * row,
                          p_.w.stride * pixel,
                          p1 - p0,
                          q1 - q0};
        if (o.columns == 1) {
          std::swap(o.rows, o.columns);
          std::swap(o.dy_row, o.dy_column);
          std::swap(o.x_row, o.x_column);
        }
        kernels<T>().outer_product(o, p_.n, tile.vectors, tile.skip,
                                   sums + (r * column_taps_ + s) * p_.n * padded_ + tile.first,
                                   padded_);
      }
    }
  }

  // Input rows [begin, end) with the tile's channels side by side.
  const T* fill_panel(std::vector<T>& panel, int64_t image, const Tile& tile, int64_t begin,
                      int64_t end) const {
    const int64_t width = tile.vectors * kLanes;
    const int64_t channels = std::min(width, p_.input_channels - tile.first);
    const int64_t from = begin * p_.w.input, count = end * p_.w.input - from;
    panel.resize(std::max<size_t>(panel.size(), count * width));
    if (channels < width) std::fill_n(panel.begin(), count * width, T(0));
    side_by_side(image, tile.first, channels, from, count, panel.data(), width);
    return panel.data();
  }

  // Input rows [begin, end), channels innermost, with zeros where taps read beside the input.
  const T* fill_rows_of_taps(std::vector<T>& panel, int64_t image, int64_t begin, int64_t end,
                             int64_t row) const {
    const int64_t left = std::min(p_.w.padding * p_.input_channels, row);
    const int64_t columns =
        std::min(p_.w.input, (row - left) / std::max<int64_t>(1, p_.input_channels));
    const int64_t filled = columns * p_.input_channels;
    panel.resize(std::max<size_t>(panel.size(), (end - begin) * row + padded_ + kLanes));
    for (int64_t y = begin; y < end; ++y) {
      T* to = panel.data() + (y - begin) * row;
      std::fill_n(to, left, T(0));
      side_by_side(image, 0, p_.input_channels, y * p_.w.input, columns, to + left,
                   p_.input_channels);
      std::fill_n(to + left + filled, row - left - filled, T(0));
    }
    std::fill_n(panel.data() + (end - begin) * row, padded_ + kLanes, T(0));
    return panel.data();
  }

  // to[i * width + c]: channels [first, first + channels) of pixels [from, from + count).
  void side_by_side(int64_t image, int64_t first, int64_t channels, int64_t from, int64_t count,
                    T* to, int64_t width) const {
    const int64_t plane = p_.h.input * p_.w.input;
    const T* images = x_ + image * plane * p_.input_channels;
    if (channels_last_) {
      const T* source = images + from * p_.input_channels + first;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < channels; ++c)
          to[i * width + c] = source[i * p_.input_channels + c];
      }
      return;
    }
    const T* planes[4 * kLanes];
    for (int64_t c = 0; c < channels; ++c) planes[c] = images + (first + c) * plane;
    kernels<T>().interleave(planes, channels, from, count, to, width);
  }

  void add_bias(int64_t unit, double* bias) const {
    const int64_t top = first_row(unit), pixels = (end_row(unit) - top) * p_.w.output;
    const T* dy = grad_at(unit / bands_, top);
    for (int64_t i = 0; i < pixels; ++i, dy += dy_.pixel_stride) {
      for (int64_t k = 0; k < p_.n; ++k) bias[k] += static_cast<double>(dy[k]);
    }
  }

  const ConvProblem& p_;
  const PackedGrad<T>& dy_;
  const T* x_;
  bool channels_last_, rows_of_taps_, panels_;
  int64_t channels_, padded_, column_taps_;
  std::vector<Tile> tiles_;
  int64_t band_rows_, bands_;
};

}  // namespace

template <class T>
DirectWgrad<T> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last) {
  flatten_pixels(p, channels_last);
  const int64_t pixels = p.images * p.h.output * p.w.output;
  if (p.n == 0 || pixels == 0) {
    return {std::vector<T>(p.n * p.taps() * p.input_channels), p.taps(), p.input_channels,
            p.input_channels, std::vector<double>(p.want_bias ? p.n : 0)};
  }
  const PackedGrad<T> dy = pack_grad(p, grad, channels_last);
  return Direct<T>(p, dy, input, channels_last).run();
}

template DirectWgrad<float> direct_wgrad(ConvProblem, const float*, const float*, bool);
template DirectWgrad<double> direct_wgrad(ConvProblem, const double*, const double*, bool);

}  // namespace neq
