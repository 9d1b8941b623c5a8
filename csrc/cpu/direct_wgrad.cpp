#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "column_gather.h"
#include "kernels.h"
#include "split.h"

namespace neq {
namespace {

constexpr int64_t kPixelsPerBand = 256;        // summed in registers before they join the others
constexpr int64_t kProductsPerItem = 1 << 17;  // of dy and x: what one parallel item is worth
constexpr int64_t kMostItems = 64;
constexpr int64_t kMostParts = 16;
constexpr int64_t kItemsPerThread = 3;
constexpr int64_t kSumsOfAllParts = 1 << 18;
constexpr int64_t kSumsBytes = 1 << 17;

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

bool are_neighbours(const int64_t* channels, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    if (channels[i] != channels[0] + i) return false;
  }
  return true;
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

  Direct(const ConvProblem& p, const T* grad, const T* input, bool channels_last)
      : p_(p),
        grad_(grad),
        x_(input),
        channels_last_(channels_last),
        reads_grad_in_place_(channels_last && are_neighbours(p.active, p.n)),
        gather_(p.active, p.n, p.output_channels, sizeof(T)),
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
    const int64_t size = p_.n * p_.h.kernel * column_taps_ * padded_;
    // The bits depend on the number of parts, so it follows from the shape; they do not depend on
    // how the tiles are shared out. Each chunk of tiles packs dY for itself, so chunks are few.
    const int64_t most_parts =
        std::clamp<int64_t>(kSumsOfAllParts / size, 1, std::min(most, kMostParts));
    const Split units(p_.images * bands_, most_parts, 1);
    const int64_t wanted =
        (kItemsPerThread * torch::stable::get_num_threads() - 1) / units.parts + 1;
    const Split chunks(static_cast<int64_t>(tiles_.size()),
                       std::clamp<int64_t>(most / units.parts, 1, wanted), 1);
    // Tiles whose sums stay in the cache while the bands of dy pass by.
    const int64_t tile_bytes = size / padded_ * tiles_.front().vectors * kVectorBytes;
    const int64_t together = std::max<int64_t>(1, kSumsBytes / tile_bytes);
    std::vector<T> sums(units.parts * size);
    std::vector<double> bias(p_.want_bias ? units.parts * p_.n : 0);
    torch::stable::parallel_for(0, units.parts * chunks.parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> panel, packed;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t part = item / chunks.parts, chunk = item % chunks.parts;
        const int64_t last = chunks.end(chunk);
        for (int64_t first = chunks.begin(chunk); first < last; first += together) {
          for (int64_t unit = units.begin(part); unit < units.end(part); ++unit) {
            const Grad dy = grad_of(unit, packed);
            for (int64_t t = first; t < std::min(last, first + together); ++t) {
              add(unit, dy, tiles_[t], panel, sums.data() + part * size);
            }
            if (p_.want_bias && first == 0) add_bias(unit, dy, bias.data() + part * p_.n);
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

  // The active channels of one band, side by side at every pixel.
  struct Grad {
    const T* data;
    int64_t pixel;
  };

  Grad grad_of(int64_t unit, std::vector<T>& packed) const {
    const int64_t image = unit / bands_, plane = p_.h.output * p_.w.output;
    const int64_t first = first_row(unit) * p_.w.output;
    const int64_t count = end_row(unit) * p_.w.output - first;
    const T* images = grad_ + image * plane * p_.output_channels;
    if (channels_last_) images += first * p_.output_channels;
    if (reads_grad_in_place_) return {images + p_.active[0], p_.output_channels};
    packed.resize(std::max<size_t>(packed.size(), count * p_.n));
    if (channels_last_) {
      using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
      gather_columns_kernel<Word>()(gather_.get(), reinterpret_cast<const Word*>(images),
                                    p_.output_channels, reinterpret_cast<Word*>(packed.data()),
                                    p_.n, count);
    } else {
      std::vector<const T*> planes(p_.n);
      for (int64_t i = 0; i < p_.n; ++i) planes[i] = images + p_.active[i] * plane;
      kernels<T>().interleave(planes.data(), p_.n, first, count, packed.data(), p_.n);
    }
    return {packed.data(), p_.n};
  }

  // Adds one band of one image to sums[tap][n][channel], for the channels of one tile.
  void add(int64_t unit, const Grad& dy, const Tile& tile, std::vector<T>& panel, T* sums) const {
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
        OuterProduct<T> o{dy.data + ((p0 - top) * p_.w.output + q0) * dy.pixel,
                          p_.w.output * dy.pixel,
                          dy.pixel,
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

  void add_bias(int64_t unit, const Grad& dy, double* bias) const {
    const int64_t pixels = (end_row(unit) - first_row(unit)) * p_.w.output;
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t k = 0; k < p_.n; ++k) bias[k] += static_cast<double>(dy.data[i * dy.pixel + k]);
    }
  }

  const ConvProblem& p_;
  const T* grad_;
  const T* x_;
  bool channels_last_, reads_grad_in_place_;
  ColumnGatherPlan gather_;
  bool rows_of_taps_, panels_;
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
  return Direct<T>(p, grad, input, channels_last).run();
}

template DirectWgrad<float> direct_wgrad(ConvProblem, const float*, const float*, bool);
template DirectWgrad<double> direct_wgrad(ConvProblem, const double*, const double*, bool);

}  // namespace neq
