#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "column_gather.h"
#include "kernels.h"
#include "prefetch.h"
#include "runs.h"
#include "scratch.h"
#include "split.h"

namespace neq {
namespace {

// As many pixels are summed in registers before they join the others. Of few pixels the library
// sums even fewer at a time, and what is summed in one go is less exact.
constexpr int64_t kPixelsPerUnit = 256, kPixelsPerSmallUnit = 128, kFewPixels = 1024;
constexpr int64_t kPixelsPerPart = 512;        // what a sum of its own is worth
constexpr int64_t kProductsPerItem = 1 << 17;  // of dy and x: what one parallel item is worth
constexpr int64_t kMostParts = 16;
constexpr int64_t kSumsOfAllParts = 1 << 20;
constexpr int64_t kPixelsTogether = 16;
constexpr int64_t kBlocksTogether = 32,
                  kMostBlocksTogether = 48;  // whose pixels of a unit fit into the second cache
constexpr int64_t kUsesWorthAPanel = 3;
constexpr int64_t kEnoughItems = 8;  // for a thread, where they cannot be shared out evenly
constexpr int64_t kSlack = 8;        // elements that are read past the end of packed pixels

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
  for (int64_t tap = 0; tap < axis.kernel; ++tap)
    ranges.push_back({axis.begin(tap), axis.end(tap)});
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
    blocks.push_back(
        {first, size,
         ColumnGatherPlan(p.active + first, size, p.output_channels, word_bytes, soon)});
    first += size;
  }
  return blocks;
}

// Adds up dy[n] x[channels], pixel by pixel, for every tap of the kernel.
//
// The pixels are taken in units: some rows of an image, or several small images. Of each unit, the
// active channels of dy are packed block by block, and the channels of x tile by tile, in a panel,
// unless they are used so little that they are read where they lie. With fewer channels than lanes
// all taps take part as channels: they are copied side by side for every pixel.
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
        taps_as_channels_(p.input_channels < kLanes),
        panels_(!channels_last ||
                p.taps() * static_cast<int64_t>(blocks_.size()) >= kUsesWorthAPanel),
        step_h_(takes_steps(p.h) ? p.h.stride : 1),
        step_w_(takes_steps(p.w) ? p.w.stride : 1),
        channels_(p.input_channels * (taps_as_channels_ ? p.taps() : 1)),
        padded_(std::max(channels_, kLanes)),
        tiles_(channel_tiles(padded_, kLanes, p.n)),
        taps_h_(tap_ranges(p.h)),
        taps_w_(tap_ranges(p.w)),
        products_(static_cast<double>(p.n * size_of_sums()) * static_cast<double>(pixels())),
        parts_(number_of_parts()),
        band_rows_(rows_of_band()),
        bands_(divided_up(p.h.output, band_rows_)),
        images_(bands_ > 1 ? 1
                           : std::clamp<int64_t>(pixels_per_unit() / (p.h.output * p.w.output), 1,
                                                 p.images)) {}

  std::vector<double> run() {
    const int64_t n = p_.n;
    const int64_t size = size_of_sums();
    // The bits depend on the number of parts, so it follows from the shape; they do not depend on
    // how blocks and tiles are shared out.
    const Split units(divided_up(p_.images, images_) * bands_, parts_, 1);
    const int64_t threads = std::min<int64_t>(
        torch::stable::get_num_threads(), static_cast<int64_t>(products_ / kProductsPerItem) + 1);
    const Split groups(static_cast<int64_t>(blocks_.size()), number_of_groups(threads), 1);
    // Each chunk of tiles packs dy for itself, so tiles are shared out only where the rest would
    // leave threads without work.
    const int64_t others = units.parts * groups.parts;
    const bool is_even = others % threads == 0 || others >= kEnoughItems * threads;
    const Split chunks(static_cast<int64_t>(tiles_.size()), is_even ? 1 : threads, 1);

    const bool in_place = units.parts == 1 && !taps_inside_ && padded_ == channels_;
    static thread_local Scratch<T> scratch_of_sums;
    T* sums = in_place ? nullptr : scratch_of_sums.at_least(units.parts * n * size);
    std::vector<T*> sums_of(units.parts * n);
    for (int64_t i = 0; i < units.parts * n; ++i) {
      sums_of[i] = in_place ? gradient_ + p_.active[i] * size : sums + i * size;
    }
    if (in_place) {
      for_each_row(n, p_.output_channels, size,
                   [&](int64_t i) { std::fill_n(gradient_ + p_.active[i] * size, size, T(0)); });
    }
    std::vector<double> bias(p_.want_bias ? units.parts * n : 0);
    torch::stable::parallel_for(0, others * chunks.parts, 1, [&](int64_t begin, int64_t end) {
      static thread_local Operands scratch;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks.parts, group = item / chunks.parts % groups.parts;
        const int64_t part = item / chunks.parts / groups.parts;
        T* const* targets = sums_of.data() + part * n;
        for (int64_t u = units.begin(part); u < units.end(part); ++u) {
          const Unit unit = unit_at(u);
          const int64_t first = groups.begin(group), last = groups.end(group);
          pack_grad(unit, first, last, scratch.grad);
          if (p_.want_bias && chunk == 0) {
            add_bias(unit, first, last, scratch.grad, bias.data() + part * n);
          }
          if (taps_as_channels_) fill_taps(unit, scratch);
          const Unit next = unit_at(std::min(u + 1, units.end(part) - 1));
          const int64_t calls = (last - first) * (chunks.end(chunk) - chunks.begin(chunk));
          Prefetcher<T> next_grad(grad_of(next, first, last), calls);
          Prefetcher<T> next_input(input_of(next, chunks.begin(chunk), chunks.end(chunk)), calls);
          for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
            if (!taps_as_channels_ && panels_) fill_panel(unit, tiles_[t], scratch.input);
            const Pixels x = pixels_of(unit, tiles_[t], scratch.input.data());
            const T* dy = scratch.grad.data();
            for (int64_t b = first; b < last; ++b) {
              add(unit, dy, blocks_[b], x, tiles_[t], targets, u == units.begin(part));
              dy += unit.pixels(p_) * blocks_[b].size;
              if (u + 1 < units.end(part)) {
                next_grad.fetch_some();
                next_input.fetch_some();
              }
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
  int64_t pixels() const { return p_.images * p_.h.output * p_.w.output; }

  int64_t pixels_per_unit() const {
    return p_.images > 1 && pixels() <= kFewPixels ? kPixelsPerSmallUnit : kPixelsPerUnit;
  }

  int64_t size_of_sums() const { return taps_as_channels_ ? padded_ : p_.taps() * padded_; }

  // A power of two, so that threads get equal shares.
  int64_t number_of_parts() const {
    const int64_t most =
        std::min({kMostParts, kSumsOfAllParts / (p_.n * size_of_sums()),
                  static_cast<int64_t>(products_ / kProductsPerItem), pixels() / kPixelsPerPart});
    int64_t parts = 1;
    while (2 * parts <= most) parts *= 2;
    return parts;
  }

  // Of blocks. Where there are several anyway, as many as the threads can share evenly.
  int64_t number_of_groups(int64_t threads) const {
    const auto blocks = static_cast<int64_t>(blocks_.size());
    const int64_t groups = divided_up(blocks, kBlocksTogether);
    if (groups == 1 || parts_ % threads == 0) return groups;
    const int64_t more = divided_up(groups, threads) * threads, fewer = more - threads;
    return fewer > 0 && blocks <= fewer * kMostBlocksTogether ? fewer : more;
  }

  // Output rows of a unit. Those of a single image are shared out among the parts.
  int64_t rows_of_band() const {
    const int64_t most = std::clamp<int64_t>(pixels_per_unit() / p_.w.output, 1, p_.h.output);
    const int64_t bands = divided_up(p_.h.output, most);
    const int64_t even = p_.images > 1 ? bands : divided_up(bands, parts_) * parts_;
    return divided_up(p_.h.output, even);
  }

  // Whether a panel holds only the pixels that are read.
  bool takes_steps(const Axis& axis) const {
    return panels_ && !taps_as_channels_ && axis.kernel == 1 && axis.padding == 0;
  }

  // Copies of a unit's operands: dy block by block, x with some channels side by side, and rows of
  // x.
  struct Operands {
    Scratch<T> grad, input, rows;
  };

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

  // Channels of x at the pixels of a unit; the first row in memory is row `begin`.
  struct Pixels {
    const T* data;
    int64_t image, row, pixel, begin;
  };

  Pixels pixels_of(const Unit& unit, const Tile& tile, const T* copied) const {
    if (taps_as_channels_) return {copied + tile.first, 0, 0, taps_stride(), 0};
    if (panels_) {
      int64_t begin, end;
      rows_read(unit, begin, end);
      const int64_t width = tile.vectors * kLanes, row = panel_columns() * width;
      return {copied, (end - begin) * row, row, width, begin};
    }
    const int64_t row = p_.w.input * p_.input_channels, image = p_.h.input * row;
    return {x_ + unit.image * image + tile.first, image, row, p_.input_channels, 0};
  }

  int64_t panel_columns() const { return step_w_ == 1 ? p_.w.input : p_.w.output; }

  // A vector more than needed: what is copied ends with a whole one.
  int64_t taps_stride() const { return channels_ + kLanes; }

  // Rows of the input that a unit reads, counted in steps.
  void rows_read(const Unit& unit, int64_t& begin, int64_t& end) const {
    const int64_t stride = p_.h.stride / step_h_, from = -p_.h.padding;
    begin = std::max<int64_t>(0, unit.top * stride + from);
    const int64_t last = (unit.bottom - 1) * stride + from + (p_.h.kernel - 1) * p_.h.dilation;
    end = std::clamp(last + 1, begin, std::max(begin, (p_.h.input - 1) / step_h_ + 1));
  }

  // Where a unit's operands lie, for some blocks and for some tiles.
  Region<T> grad_of(const Unit& unit, int64_t first, int64_t last) const {
    const int64_t plane = p_.h.output * p_.w.output, from = unit.top * p_.w.output;
    const int64_t begin = blocks_[first].first;
    const int64_t end = blocks_[last - 1].first + blocks_[last - 1].size;
    const T* images = grad_ + unit.image * plane * p_.output_channels;
    if (channels_last_) {
      const int64_t channel = p_.active[begin];
      return {images + from * p_.output_channels + channel,
              unit.pixels(p_),
              p_.active[end - 1] + 1 - channel,
              unit.pixels(p_),
              p_.output_channels,
              0,
              nullptr};
    }
    const int64_t channels = end - begin;
    return {images + from,
            unit.images * channels,
            (unit.bottom - unit.top) * p_.w.output,
            channels,
            plane,
            p_.output_channels * plane,
            p_.active + begin};
  }

  Region<T> input_of(const Unit& unit, int64_t first, int64_t last) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t from = begin * step_h_ * p_.w.input;
    const int64_t count = std::min(p_.h.input, end * step_h_) * p_.w.input - from;
    const int64_t plane = p_.h.input * p_.w.input;
    const int64_t channel = taps_as_channels_ ? 0 : tiles_[first].first;
    const int64_t channels =
        taps_as_channels_ ? p_.input_channels
                          : tiles_[last - 1].first + tiles_[last - 1].vectors * kLanes - channel;
    const T* images = x_ + unit.image * plane * p_.input_channels;
    if (channels_last_) {
      return {images + from * p_.input_channels + channel,
              unit.images * count,
              channels,
              count,
              p_.input_channels,
              plane * p_.input_channels,
              nullptr};
    }
    return {images + channel * plane + from,
            unit.images * channels,
            count,
            channels,
            plane,
            p_.input_channels * plane,
            nullptr};
  }

  // The active channels of each block, side by side at every pixel; block after block.
  void pack_grad(const Unit& unit, int64_t first, int64_t last, Scratch<T>& packed) const {
    const int64_t plane = p_.h.output * p_.w.output, from = unit.top * p_.w.output;
    const int64_t count = (unit.bottom - unit.top) * p_.w.output;
    const int64_t channels =
        blocks_[last - 1].first + blocks_[last - 1].size - blocks_[first].first;
    T* to = packed.at_least(unit.images * count * channels + kSlack);
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

  void add_bias(const Unit& unit, int64_t first, int64_t last, const Scratch<T>& packed,
                double* bias) const {
    const T* dy = packed.data();
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_[b];
      kernels<T>().sum_pixels(dy, block.size, unit.pixels(p_), bias + block.first);
      dy += unit.pixels(p_) * block.size;
    }
  }

  // The input rows of a unit with the tile's channels side by side.
  void fill_panel(const Unit& unit, const Tile& tile, Scratch<T>& panel) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t width = tile.vectors * kLanes, columns = panel_columns();
    const int64_t row = columns * width, image = (end - begin) * row;
    T* to = panel.at_least(unit.images * image);
    for (int64_t i = 0; i < unit.images; ++i, to += image) {
      if (step_h_ == 1 && step_w_ == 1) {
        side_by_side(unit.image + i, tile.first, begin * columns, (end - begin) * columns, 1, to,
                     width);
        continue;
      }
      for (int64_t y = begin; y < end; ++y) {
        side_by_side(unit.image + i, tile.first, y * step_h_ * p_.w.input, columns, step_w_,
                     to + (y - begin) * row, width);
      }
    }
  }

  // For every output pixel of a unit the channels that its taps read, tap after tap, zeros where
  // they read beside the input.
  void fill_taps(const Unit& unit, Operands& scratch) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t channels = p_.input_channels, reach = (p_.w.kernel - 1) * p_.w.dilation + 1;
    const int64_t row = ((p_.w.output - 1) * p_.w.stride + reach) * channels;
    const int64_t left = std::min(p_.w.padding * channels, row);
    const int64_t columns = std::min(p_.w.input, (row - left) / channels);
    const int64_t stride = taps_stride();
    // One row of zeros follows the others.
    T* all_rows = scratch.rows.at_least((end - begin + 1) * row + taps_stride());
    T* to = scratch.input.at_least(unit.pixels(p_) * stride + kLanes);
    std::fill_n(all_rows + (end - begin) * row, row + taps_stride(), T(0));
    for (int64_t i = unit.image; i < unit.image + unit.images; ++i) {
      T* rows = all_rows;
      for (int64_t y = begin; y < end; ++y, rows += row) {
        std::fill_n(rows, left, T(0));
        side_by_side(i, 0, y * p_.w.input, columns, 1, rows + left, channels);
        std::fill_n(rows + left + columns * channels, row - left - columns * channels, T(0));
      }
      for (int64_t p = unit.top; p < unit.bottom; ++p, to += p_.w.output * stride) {
        for (int64_t r = 0; r < p_.h.kernel; ++r) {
          const int64_t y = p * p_.h.stride - p_.h.padding + r * p_.h.dilation;
          const bool inside = begin <= y && y < end;
          copy_taps(all_rows + (inside ? y - begin : end - begin) * row,
                    to + r * p_.w.kernel * channels);
        }
      }
    }
  }

  // One row of taps for one row of pixels. Vectors are copied whole: what is written past the end,
  // the next row of taps overwrites.
  void copy_taps(const T* row, T* to) const {
    const bool neighbours = p_.w.dilation == 1;
    const int64_t length = p_.input_channels * (neighbours ? p_.w.kernel : 1);
    for (int64_t s = 0; s < (neighbours ? 1 : p_.w.kernel); ++s) {
      kernels<T>().copy_pixels(row + s * p_.w.dilation * p_.input_channels,
                               p_.w.stride * p_.input_channels, divided_up(length, kLanes),
                               p_.w.output, to + s * length, taps_stride());
    }
  }

  // to[i * width + c] is channel first + c, c < width, of `count` pixels, every step-th from `from`
  // on.
  void side_by_side(int64_t image, int64_t first, int64_t from, int64_t count, int64_t step, T* to,
                    int64_t width) const {
    const int64_t plane = p_.h.input * p_.w.input;
    const T* images = x_ + image * plane * p_.input_channels;
    if (channels_last_) {
      const T* source = images + from * p_.input_channels + first;
      const int64_t stride = step * p_.input_channels;
      if (width == stride) {
        std::copy_n(source, count * width, to);
      } else {
        kernels<T>().copy_pixels(source, stride, width / kLanes, count, to, width);
      }
      return;
    }
    const T* planes[4 * kLanes];
    for (int64_t c = 0; c < width; ++c) planes[c] = images + (first + c) * plane;
    if (step == 1) {
      kernels<T>().interleave(planes, width, from, count, to, width);
      return;
    }
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = 0; i < count; ++i) to[i * width + c] = planes[c][from + i * step];
    }
  }

  // Adds one unit to targets[n][tap][channel], for one block and the channels of one tile.
  void add(const Unit& unit, const T* dy, const Block& block, const Pixels& x, const Tile& tile,
           T* const* targets, bool fresh) const {
    const int64_t at = tile.first;
    if (taps_as_channels_) {
      const OuterProduct<T> o{1, 1,       unit.pixels(p_),       dy, 0,    0, block.size, x.data, 0,
                              0, x.pixel, targets + block.first, at, fresh};
      kernels<T>().outer_product(o, block.size, tile.vectors, tile.skip);
      return;
    }
    const int64_t stride_h = step_h_ == 1 ? p_.h.stride : 1;
    const int64_t stride_w = step_w_ == 1 ? p_.w.stride : 1;
    const int64_t dy_row = p_.w.output * block.size;
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      const int64_t p0 = std::max(unit.top, taps_h_[r].begin);
      const int64_t p1 = std::min(unit.bottom, taps_h_[r].end);
      const int64_t y0 = p0 * stride_h - p_.h.padding + r * p_.h.dilation - x.begin;
      for (int64_t s = 0; s < p_.w.kernel; ++s) {
        const int64_t q0 = taps_w_[s].begin, q1 = taps_w_[s].end;
        const int64_t sums = (r * p_.w.kernel + s) * padded_ + at;
        if (p0 >= p1 || q0 >= q1) {
          if (fresh) clear(block, tile, targets, sums);
          continue;
        }
        const int64_t x0 = q0 * stride_w - p_.w.padding + s * p_.w.dilation;
        OuterProduct<T> o{unit.images,
                          p1 - p0,
                          q1 - q0,
                          dy + (p0 - unit.top) * dy_row + q0 * block.size,
                          (unit.bottom - unit.top) * dy_row,
                          dy_row,
                          block.size,
                          x.data + y0 * x.row + x0 * x.pixel,
                          x.image,
                          stride_h * x.row,
                          stride_w * x.pixel,
                          targets + block.first,
                          sums,
                          fresh};
        join_loops(o);
        kernels<T>().outer_product(o, block.size, tile.vectors, tile.skip);
      }
    }
  }

  static void clear(const Block& block, const Tile& tile, T* const* targets, int64_t at) {
    for (int64_t i = block.first; i < block.first + block.size; ++i) {
      std::fill(targets[i] + at + tile.skip, targets[i] + at + tile.vectors * kLanes, T(0));
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
  void write_gradient(T* sums, int64_t parts, int64_t size) const {
    const int64_t n = p_.n, taps = p_.taps(), row = taps * p_.input_channels;
    for_each_row(0, p_.output_channels, row * (1 + parts), [&](int64_t i) {
      T* to = gradient_ + p_.active[i] * row;
      if (i >= n) {
        std::fill_n(to, row, T(0));
        return;
      }
      T* total = sums + i * size;
      for (int64_t part = 1; part < parts; ++part) {
        const T* more = total + part * n * size;
        for (int64_t j = 0; j < size; ++j) total[j] += more[j];
      }
      if (taps_inside_ && !taps_as_channels_) {
        std::vector<const T*> planes(taps);
        for (int64_t tap = 0; tap < taps; ++tap) planes[tap] = total + tap * padded_;
        kernels<T>().interleave(planes.data(), taps, 0, p_.input_channels, to, taps);
        return;
      }
      const int64_t channels = p_.input_channels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* from = total + tap * (taps_as_channels_ ? channels : padded_);
        T* target = to + (taps_inside_ ? tap : tap * channels);
        for (int64_t c = 0; c < channels; ++c) target[taps_inside_ ? c * taps : c] = from[c];
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
  bool taps_as_channels_, panels_;
  int64_t step_h_, step_w_;
  int64_t channels_, padded_;
  std::vector<Tile> tiles_;
  std::vector<TapRange> taps_h_, taps_w_;
  double products_;
  int64_t parts_, band_rows_, bands_, images_;
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
