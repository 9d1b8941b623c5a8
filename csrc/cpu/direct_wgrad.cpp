#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "column_gather.h"
#include "kernels.h"
#include "runs.h"
#include "split.h"

namespace neq {
namespace {

constexpr int64_t kPixelsPerUnit = 256;        // summed in registers before they join the others
constexpr int64_t kPixelsPerPart = 512;        // what a sum of its own is worth
constexpr int64_t kProductsPerItem = 1 << 17;  // of dy and x: what one parallel item is worth
constexpr int64_t kMostParts = 16;
constexpr int64_t kSumsOfAllParts = 1 << 20;
constexpr int64_t kPixelsTogether = 16;
constexpr int64_t kBlocksTogether = 32;  // whose pixels of a unit fit into the second cache
constexpr int64_t kUsesWorthAPanel = 3;
constexpr int64_t kSlack = 8;  // elements that are read past the end of packed pixels

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    // Two and one are slower than three.
    const int64_t vectors = left / lanes == 3 ? 3 : std::min(widest, left / lanes);
    tiles.push_back({c, vectors, 0});
    c += vectors * lanes;
  }
  return tiles;
}

// The output rows, or columns, that read inside the input by each tap.
struct TapRange {
  int64_t begin, end;
};

std::vector<TapRange> tap_ranges(const Axis& axis) {
  std::vector<TapRange> ranges;
  for (int64_t tap = 0; tap < axis.kernel; ++tap) ranges.push_back({axis.begin(tap), axis.end(tap)});
  return ranges;
}

// Active channels whose sums are in registers at the same time.
struct Block {
  int64_t first, size;
  ColumnGatherPlan plan;
};

std::vector<Block> channel_blocks(const ConvProblem& p, int64_t word_bytes) {
  std::vector<Block> blocks;
  int64_t first = 0;
  for (int64_t left = divided_up(p.n, kRowsTogether); left > 0; --left) {
    const int64_t size = divided_up(p.n - first, left);
    const int64_t soon = std::min(size, p.n - first - size);
    blocks.push_back({first, size,
                      ColumnGatherPlan(p.active + first, size, p.output_channels, word_bytes,
                                       soon)});
    first += size;
  }
  return blocks;
}

// Adds up dy[n] x[channels], pixel by pixel, for every tap of the kernel.
//
// The pixels are taken in units: some rows of an image, or several small images. Of each unit, the
// active channels of dy are packed block by block, and the channels of x tile by tile, in a panel,
// unless they are used so little that they are read where they lie. With fewer channels than lanes
// the taps of a kernel row take part as channels: they are neighbours in a zero-padded copy of the
// input's rows.
template <class T>
class Direct {
 public:
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

  Direct(const ConvProblem& p, const T* grad, const T* input, bool channels_last, T* gradient,
         bool taps_inside)
      : p_(p),
        grad_(grad),
        x_(input),
        channels_last_(channels_last),
        gradient_(gradient),
        taps_inside_(taps_inside && p.taps() > 1),
        blocks_(channel_blocks(p, sizeof(T))),
        rows_of_taps_(p.input_channels < kLanes && p.w.dilation == 1),
        panels_(!channels_last || p.input_channels < kLanes ||
                p.taps() * static_cast<int64_t>(blocks_.size()) >= kUsesWorthAPanel),
        step_h_(takes_steps(p.h) ? p.h.stride : 1),
        step_w_(takes_steps(p.w) ? p.w.stride : 1),
        channels_(p.input_channels * (rows_of_taps_ ? p.w.kernel : 1)),
        padded_(std::max(channels_, kLanes)),
        column_taps_(rows_of_taps_ ? 1 : p.w.kernel),
        tiles_(channel_tiles(padded_, kLanes, p.n)),
        taps_h_(tap_ranges(p.h)),
        taps_w_(tap_ranges(p.w)),
        bands_(divided_up(p.h.output,
                          std::clamp<int64_t>(kPixelsPerUnit / p.w.output, 1, p.h.output))),
        band_rows_(divided_up(p.h.output, bands_)),
        images_(bands_ > 1 ? 1
                           : std::clamp<int64_t>(kPixelsPerUnit / (p.h.output * p.w.output), 1,
                                                 p.images)) {}

  std::vector<double> run() {
    const int64_t n = p_.n, pixels = p_.images * p_.h.output * p_.w.output;
    const int64_t size = p_.h.kernel * column_taps_ * padded_;
    const double products = static_cast<double>(n * size) * static_cast<double>(pixels);
    // The bits depend on the number of parts, so it follows from the shape; they do not depend on
    // how blocks and tiles are shared out.
    const int64_t most_parts = std::min({kMostParts, kSumsOfAllParts / (n * size),
                                         static_cast<int64_t>(products / kProductsPerItem),
                                         pixels / kPixelsPerPart});
    const Split units(divided_up(p_.images, images_) * bands_,
                      std::max<int64_t>(1, most_parts), 1);
    const Split groups(static_cast<int64_t>(blocks_.size()),
                       divided_up(static_cast<int64_t>(blocks_.size()), kBlocksTogether), 1);
    // Each chunk of tiles packs dy for itself, so there are no more than needed.
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(),
                          static_cast<int64_t>(products / kProductsPerItem) + 1);
    const int64_t others = units.parts * groups.parts;
    const Split chunks(static_cast<int64_t>(tiles_.size()),
                       divided_up(threads, others), 1);

    const bool in_place = units.parts == 1 && !taps_inside_ && padded_ == p_.input_channels;
    std::vector<T> sums(in_place ? 0 : units.parts * n * size);
    std::vector<T*> sums_of(units.parts * n);
    for (int64_t i = 0; i < units.parts * n; ++i) {
      sums_of[i] = in_place ? gradient_ + p_.active[i] * size : sums.data() + i * size;
    }
    const bool fresh = p_.taps() == 1 && p_.h.padding == 0 && p_.w.padding == 0;
    if (in_place) {
      for_each_row(fresh ? n : 0, p_.output_channels, size, [&](int64_t i) {
        std::fill_n(gradient_ + p_.active[i] * size, size, T(0));
      });
    }
    std::vector<double> bias(p_.want_bias ? units.parts * n : 0);
    torch::stable::parallel_for(0, others * chunks.parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> panel, packed;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks.parts, group = item / chunks.parts % groups.parts;
        const int64_t part = item / chunks.parts / groups.parts;
        T* const* targets = sums_of.data() + part * n;
        for (int64_t u = units.begin(part); u < units.end(part); ++u) {
          const Unit unit = unit_at(u);
          pack_grad(unit, groups.begin(group), groups.end(group), packed);
          if (p_.want_bias && chunk == 0) {
            add_bias(unit, groups.begin(group), groups.end(group), packed,
                     bias.data() + part * n);
          }
          Pixels x{};
          if (rows_of_taps_) x = fill_rows_of_taps(unit, panel);
          for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
            if (!rows_of_taps_) x = panels_ ? fill_panel(unit, tiles_[t], panel) : in_place_of(unit, tiles_[t]);
            const T* dy = packed.data();
            for (int64_t b = groups.begin(group); b < groups.end(group); ++b) {
              add(unit, dy, blocks_[b], x, tiles_[t], targets,
                  fresh && u == units.begin(part));
              dy += unit.pixels(p_) * blocks_[b].size;
            }
          }
        }
      }
    });
    if (!in_place) write_gradient(sums, units.parts, size);
    for (int64_t part = 1; p_.want_bias && part < units.parts; ++part) {
      for (int64_t i = 0; i < n; ++i) bias[i] += bias[part * n + i];
    }
    bias.resize(p_.want_bias ? n : 0);
    return bias;
  }

 private:
  // Whether a panel holds only the pixels that are read.
  bool takes_steps(const Axis& axis) const {
    return panels_ && !rows_of_taps_ && axis.kernel == 1 && axis.padding == 0;
  }

  // Output rows [top, bottom) of some images.
  struct Unit {
    int64_t image, images, top, bottom;
    int64_t pixels(const ConvProblem& p) const { return images * (bottom - top) * p.w.output; }
  };

  Unit unit_at(int64_t index) const {
    const int64_t image = index / bands_ * images_, top = index % bands_ * band_rows_;
    return {image, std::min(images_, p_.images - image), top,
            std::min(p_.h.output, top + band_rows_)};
  }

  // Channels of x at the pixels of a unit, in memory. `data` is that of row `begin`, and of the
  // column `left` columns beside the input.
  struct Pixels {
    const T* data;
    int64_t image, row, pixel, begin, left;
  };

  // Rows of the input that a unit reads, counted in steps.
  void rows_read(const Unit& unit, int64_t& begin, int64_t& end) const {
    const int64_t stride = p_.h.stride / step_h_, from = -p_.h.padding;
    begin = std::max<int64_t>(0, unit.top * stride + from);
    const int64_t last = (unit.bottom - 1) * stride + from + (p_.h.kernel - 1) * p_.h.dilation;
    end = std::clamp(last + 1, begin, std::max(begin, (p_.h.input - 1) / step_h_ + 1));
  }

  // The active channels of each block, side by side at every pixel; block after block.
  void pack_grad(const Unit& unit, int64_t first, int64_t last, std::vector<T>& packed) const {
    const int64_t plane = p_.h.output * p_.w.output, from = unit.top * p_.w.output;
    const int64_t count = (unit.bottom - unit.top) * p_.w.output;
    const int64_t channels = blocks_[last - 1].first + blocks_[last - 1].size - blocks_[first].first;
    packed.resize(std::max<size_t>(packed.size(), unit.images * count * channels + kSlack));
    T* to = packed.data();
    if (channels_last_) {
      gather_grad(grad_ + (unit.image * plane + from) * p_.output_channels, unit.images * count,
                  first, last, to);
      return;
    }
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_[b];
      for (int64_t image = unit.image; image < unit.image + unit.images; ++image) {
        const T* planes[kRowsTogether];
        for (int64_t k = 0; k < block.size; ++k) {
          planes[k] = grad_ + (image * p_.output_channels + p_.active[block.first + k]) * plane;
        }
        kernels<T>().interleave(planes, block.size, from, count, to, block.size);
        to += count * block.size;
      }
    }
  }

  // A few pixels of all blocks at a time: they lie in the first cache.
  void gather_grad(const T* pixels, int64_t count, int64_t first, int64_t last, T* to) const {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const auto gather = gather_columns_kernel<Word>();
    for (int64_t i = 0; i < count; i += kPixelsTogether) {
      const int64_t some = std::min(kPixelsTogether, count - i);
      T* packed = to;
      for (int64_t b = first; b < last; ++b) {
        const Block& block = blocks_[b];
        gather(block.plan.get((count - i - some) * block.size),
               reinterpret_cast<const Word*>(pixels + i * p_.output_channels), p_.output_channels,
               reinterpret_cast<Word*>(packed + i * block.size), block.size, some);
        packed += count * block.size;
      }
    }
  }

  void add_bias(const Unit& unit, int64_t first, int64_t last, const std::vector<T>& packed,
                double* bias) const {
    const T* dy = packed.data();
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_[b];
      kernels<T>().sum_pixels(dy, block.size, unit.pixels(p_), bias + block.first);
      dy += unit.pixels(p_) * block.size;
    }
  }

  Pixels in_place_of(const Unit& unit, const Tile& tile) const {
    const int64_t row = p_.w.input * p_.input_channels, image = p_.h.input * row;
    return {x_ + unit.image * image + tile.first, image, row, p_.input_channels, 0, 0};
  }

  // The input rows of a unit with the tile's channels side by side.
  Pixels fill_panel(const Unit& unit, const Tile& tile, std::vector<T>& panel) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t width = tile.vectors * kLanes;
    const int64_t channels = std::min(width, p_.input_channels - tile.first);
    const int64_t columns = step_w_ == 1 ? p_.w.input : p_.w.output;
    const int64_t row = columns * width, image = (end - begin) * row;
    panel.resize(std::max<size_t>(panel.size(), unit.images * image));
    if (channels < width) std::fill_n(panel.begin(), unit.images * image, T(0));
    for (int64_t i = 0; i < unit.images; ++i) {
      T* to = panel.data() + i * image;
      if (step_h_ == 1 && step_w_ == 1) {
        side_by_side(unit.image + i, tile.first, channels, begin * columns, (end - begin) * columns,
                     1, to, width);
        continue;
      }
      for (int64_t y = begin; y < end; ++y) {
        side_by_side(unit.image + i, tile.first, channels, y * step_h_ * p_.w.input, columns,
                     step_w_, to + (y - begin) * row, width);
      }
    }
    return {panel.data(), image, row, width, begin, 0};
  }

  // The input rows of a unit, channels innermost, with zeros where taps read beside the input.
  Pixels fill_rows_of_taps(const Unit& unit, std::vector<T>& panel) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t pixel = p_.input_channels;
    const int64_t row = ((p_.w.output - 1) * p_.w.stride + p_.w.kernel) * pixel;
    const int64_t left = std::min(p_.w.padding * pixel, row);
    const int64_t columns = std::min(p_.w.input, (row - left) / pixel);
    const int64_t filled = columns * pixel, image = (end - begin) * row;
    panel.resize(std::max<size_t>(panel.size(), unit.images * image + padded_ + kLanes));
    T* to = panel.data();
    for (int64_t i = 0; i < unit.images; ++i) {
      for (int64_t y = begin; y < end; ++y, to += row) {
        std::fill_n(to, left, T(0));
        side_by_side(unit.image + i, 0, pixel, y * p_.w.input, columns, 1, to + left, pixel);
        std::fill_n(to + left + filled, row - left - filled, T(0));
      }
    }
    std::fill_n(to, padded_ + kLanes, T(0));
    return {panel.data(), image, row, pixel, begin, p_.w.padding};
  }

  // to[i * width + c]: channels [first, first + channels) of `count` pixels, every step-th from
  // `from` on.
  void side_by_side(int64_t image, int64_t first, int64_t channels, int64_t from, int64_t count,
                    int64_t step, T* to, int64_t width) const {
    const int64_t plane = p_.h.input * p_.w.input;
    const T* images = x_ + image * plane * p_.input_channels;
    if (channels_last_) {
      const T* source = images + from * p_.input_channels + first;
      const int64_t stride = step * p_.input_channels;
      if (width == stride) {
        std::copy_n(source, count * width, to);
        return;
      }
      if (channels == width && channels % kLanes == 0) {
        kernels<T>().copy_pixels(source, stride, channels / kLanes, count, to);
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < channels; ++c) to[i * width + c] = source[i * stride + c];
      }
      return;
    }
    const T* planes[4 * kLanes];
    for (int64_t c = 0; c < channels; ++c) planes[c] = images + (first + c) * plane;
    if (step == 1) {
      kernels<T>().interleave(planes, channels, from, count, to, width);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < count; ++i) to[i * width + c] = planes[c][from + i * step];
    }
  }

  // Adds one unit to targets[n][tap][channel], for one block and the channels of one tile.
  void add(const Unit& unit, const T* dy, const Block& block, const Pixels& x, const Tile& tile,
           T* const* targets, bool fresh) const {
    const int64_t stride_h = step_h_ == 1 ? p_.h.stride : 1;
    const int64_t stride_w = step_w_ == 1 ? p_.w.stride : 1;
    const int64_t dy_row = p_.w.output * block.size;
    const T* data = x.data + (rows_of_taps_ ? tile.first : 0);
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      const int64_t p0 = std::max(unit.top, taps_h_[r].begin),
                    p1 = std::min(unit.bottom, taps_h_[r].end);
      if (p0 >= p1) continue;
      const int64_t y0 = p0 * stride_h - p_.h.padding + r * p_.h.dilation - x.begin;
      for (int64_t s = 0; s < column_taps_; ++s) {
        const int64_t q0 = rows_of_taps_ ? 0 : taps_w_[s].begin;
        const int64_t q1 = rows_of_taps_ ? p_.w.output : taps_w_[s].end;
        if (q0 >= q1) continue;
        const int64_t x0 = q0 * stride_w - p_.w.padding + s * p_.w.dilation + x.left;
        OuterProduct<T> o{unit.images,
                          p1 - p0,
                          q1 - q0,
                          dy + (p0 - unit.top) * dy_row + q0 * block.size,
                          (unit.bottom - unit.top) * dy_row,
                          dy_row,
                          block.size,
                          data + y0 * x.row + x0 * x.pixel,
                          x.image,
                          stride_h * x.row,
                          stride_w * x.pixel,
                          targets + block.first,
                          (r * column_taps_ + s) * padded_ + tile.first,
                          fresh};
        join_loops(o);
        kernels<T>().outer_product(o, block.size, tile.vectors, tile.skip);
      }
    }
  }

  // Loops that go on where the one inside of them ends become one.
  static void join_loops(OuterProduct<T>& o) {
    if (o.images == 1 || (o.dy_image == o.rows * o.dy_row && o.x_image == o.rows * o.x_row)) {
      o.rows *= o.images;
      o.images = 1;
    }
    if (o.columns == 1) {
      o.dy_column = o.dy_row;
      o.x_column = o.x_row;
      std::swap(o.rows, o.columns);
    } else if (o.dy_row == o.columns * o.dy_column && o.x_row == o.columns * o.x_column) {
      o.columns *= o.rows;
      o.rows = 1;
    }
  }

  // Adds up the parts and puts the rows where they belong.
  void write_gradient(std::vector<T>& sums, int64_t parts, int64_t size) const {
    const int64_t n = p_.n, taps = p_.taps(), row = taps * p_.input_channels;
    for_each_row(0, p_.output_channels, row * (1 + parts), [&](int64_t i) {
      T* to = gradient_ + p_.active[i] * row;
      if (i >= n) {
        std::fill_n(to, row, T(0));
        return;
      }
      T* total = sums.data() + i * size;
      for (int64_t part = 1; part < parts; ++part) {
        const T* more = total + part * n * size;
        for (int64_t j = 0; j < size; ++j) total[j] += more[j];
      }
      if (taps_inside_ && !rows_of_taps_) {
        std::vector<const T*> planes(taps);
        for (int64_t tap = 0; tap < taps; ++tap) planes[tap] = total + tap * padded_;
        kernels<T>().interleave(planes.data(), taps, 0, p_.input_channels, to, taps);
        return;
      }
      const int64_t tap_stride = taps_inside_ ? 1 : p_.input_channels;
      const int64_t channel_stride = taps_inside_ ? taps : 1;
      for (int64_t r = 0; r < p_.h.kernel; ++r) {
        for (int64_t s = 0; s < p_.w.kernel; ++s) {
          const T* sums_of_tap = total + (rows_of_taps_ ? r * padded_ + s * p_.input_channels
                                                        : (r * p_.w.kernel + s) * padded_);
          T* target = to + (r * p_.w.kernel + s) * tap_stride;
          for (int64_t c = 0; c < p_.input_channels; ++c) target[c * channel_stride] = sums_of_tap[c];
        }
      }
    });
  }

  template <class F>
  static void for_each_row(int64_t first, int64_t last, int64_t size, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, size));
    torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  const ConvProblem& p_;
  const T* grad_;
  const T* x_;
  bool channels_last_;
  T* gradient_;
  bool taps_inside_;
  std::vector<Block> blocks_;
  bool rows_of_taps_, panels_;
  int64_t step_h_, step_w_;
  int64_t channels_, padded_, column_taps_;
  std::vector<Tile> tiles_;
  std::vector<TapRange> taps_h_, taps_w_;
  int64_t bands_, band_rows_, images_;
};

}  // namespace

template <class T>
std::vector<double> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last,
                                 T* gradient, bool taps_inside) {
  flatten_pixels(p, channels_last);
  if (p.n == 0 || p.images * p.h.output * p.w.output == 0) {
    std::fill_n(gradient, p.output_channels * p.taps() * p.input_channels, T(0));
    return std::vector<double>(p.want_bias ? p.n : 0);
  }
  return Direct<T>(p, grad, input, channels_last, gradient, taps_inside).run();
}

template std::vector<double> direct_wgrad(ConvProblem, const float*, const float*, bool, float*,
                                          bool);
template std::vector<double> direct_wgrad(ConvProblem, const double*, const double*, bool, double*,
                                          bool);

}  // namespace neq
