// What the direct wgrad multiplies: units of pixels, of which the active channels of dy are packed
// block by block, and the channels of x tile by tile.
#pragma once

#include <algorithm>
#include <vector>

#include "../simd/kernels.h"
#include "../tensor/prefetch.h"
#include "column_gather.h"
#include "convolution.h"
#include "direct_tiles.h"
#include "direct_units.h"
#include "planes.h"
#include "side_by_side.h"

namespace neq {

// As many pixels are summed in registers before they join the others. Of few pixels PyTorch's
// kernels sum even fewer at a time, and what is summed in one go is less exact.
constexpr int64_t kPixelsPerUnit = 256, kPixelsPerSmallUnit = 128, kFewPixels = 1024;
constexpr int64_t kPixelsPerPart = 512;          // what a sum of its own is worth
constexpr int64_t kProductsPerPart = 1 << 17;    // of dy and x
constexpr int64_t kParts = 16, kMostParts = 64;  // the most while all sums stay in the second cache
constexpr int64_t kSumsOfAllParts = 1 << 20, kCachedSums = 1 << 16;
constexpr int64_t kPixelsTogether = 16;         // that are gathered block after block
constexpr int64_t kElementsTogether = 1 << 15;  // of panels that are used in turn
constexpr int64_t kUsesWorthAPanel = 3;
constexpr int64_t kSlack = 8;  // elements that are read past the end of packed pixels

// The pixels are taken in units: some rows of an image, or several small images. Channels of x are
// copied side by side, into a panel, unless they are used so little that they are read where they
// lie. With fewer channels than lanes all taps take part as channels: they are copied side by side
// for every pixel. Elements of type T become elements of type P while they are copied.
template <class T, class P = Compute<T>>
class Operands {
 public:
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(P));

  Operands(const ConvProblem& p, const T* grad, const T* input, bool channels_last)
      : p_(p),
        grad_(grad),
        x_(p, input, channels_last),
        channels_last_(channels_last),
        k_(direct_kernels<T, P>()),
        planes_(Planes<T, P>::serve(p, channels_last)),
        blocks_(channel_blocks(p, sizeof(P), planes_ ? k_.dot_rows : k_.tile_limits.rows)),
        taps_as_channels_(p.input_channels < kLanes),
        panels_(!planes_ &&
                (!std::is_same_v<T, P> || !channels_last ||
                 (!lies_side_by_side() &&
                  p.taps() * static_cast<int64_t>(blocks_.size()) >= kUsesWorthAPanel))),
        step_h_(takes_steps(p.h) ? p.h.stride : 1),
        step_w_(takes_steps(p.w) ? p.w.stride : 1),
        apart_(kIsPair<P> && (taps_as_channels_ || (takes_steps(p.h) && takes_steps(p.w))) ? 2 : 1),
        channels_(p.input_channels * (taps_as_channels_ ? p.taps() : 1)),
        padded_(taps_as_channels_ ? divided_up(channels_, kLanes) * kLanes
                                  : std::max(channels_, kLanes)),
        tiles_(tiles_of_channels()),
        parts_(number_of_parts()),
        band_rows_(rows_of_band()),
        bands_(divided_up(p.h.output, band_rows_)),
        images_(bands_ > 1 ? 1
                           : std::clamp<int64_t>(pixels_per_unit() / (p.h.output * p.w.output), 1,
                                                 p.images)) {}

  const DirectKernels<T, P>& kernels() const { return k_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const std::vector<Tile>& tiles() const { return tiles_; }
  bool taps_as_channels() const { return taps_as_channels_; }

  // The channels of a tap, or of all of them, and how many sums each output channel has of them.
  int64_t channels() const { return channels_; }
  int64_t padded() const { return padded_; }
  int64_t size_of_sums() const { return taps_as_channels_ ? padded_ : p_.taps() * padded_; }

  double products() const {
    return static_cast<double>(p_.n * size_of_sums()) * static_cast<double>(pixels());
  }

  // Into how many sums the units are added up. It follows from the shape alone.
  int64_t parts() const { return parts_; }
  int64_t units() const { return divided_up(p_.images, images_) * bands_; }

  Unit unit_at(int64_t index) const {
    const int64_t image = index / bands_ * images_, top = index % bands_ * band_rows_;
    return {image, std::min(images_, p_.images - image), top,
            std::min(p_.h.output, top + band_rows_)};
  }

  int64_t pixels_of(const Unit& unit) const {
    return unit.images * (unit.bottom - unit.top) * p_.w.output;
  }

  // Pixels from one element of the copies to the next. Where a single tap reads them, or all taps
  // at once, every other pixel begins no pair that is read.
  int64_t apart() const { return apart_; }

  Runs runs_of(const Unit& unit) const {
    const int64_t run = (pairs_cross_rows() ? unit.bottom - unit.top : 1) * p_.w.output;
    if (apart_ == 1 || run % 2 == 0) return {1, pixels_of(unit)};
    return {pixels_of(unit) / run, run};
  }

  int64_t elements_of(const Unit& unit) const {
    const Runs runs = runs_of(unit);
    return runs.count * divided_up(runs.pixels, apart_);
  }

  // Of x, in pixels of a panel, from one output row or column to the next.
  int64_t stride_h() const { return step_h_ == 1 ? p_.h.stride : 1; }
  int64_t stride_w() const { return step_w_ == 1 ? p_.w.stride : 1; }

  // In a panel, from a pixel to the one it makes a pair with: that of the next output.
  int64_t next_pixel() const { return p_.w.output > 1 ? stride_w() : stride_h() * panel_columns(); }

  // Whether the last pixel of a row makes a pair with the first one of the next row.
  bool pairs_cross_rows() const {
    return !taps_as_channels_ && (takes_all_pixels() || !channels_last_);
  }

  // Whether planes are multiplied where they lie: nothing is copied.
  bool takes_planes() const { return planes_; }

  // Whether channels of x are read where they lie.
  bool reads_in_place() const { return !panels_ && !taps_as_channels_; }

  // How many tiles, up to `last`, have channels of x that fit into the cache together; or one.
  int64_t tiles_together(const Unit& unit, int64_t first, int64_t last) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t elements = unit.images * elements_of_panel(end - begin);
    return elements * channels_of(first, last) <= kElementsTogether ? last - first : 1;
  }

  // The channels of x that some tiles need, copied where they are not read in place: copies.tiles.
  void read_input(const Unit& unit, int64_t first, int64_t last, Copies<P>& copies) const {
    copies.tiles.clear();
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t elements = unit.images * elements_of_panel(end - begin);
    const bool copied = panels_ && !taps_as_channels_;
    // The last tile may overlap the one before.
    const int64_t most = elements * (channels_of(first, last) + kLanes);
    P* panel = copied ? copies.input.at_least(most) : nullptr;
    const int64_t row = p_.w.input * p_.input_channels, image = p_.h.input * row;
    for (int64_t t = first; t < last; ++t) {
      const Tile& tile = tiles_[t];
      if (taps_as_channels_) {
        copies.tiles.push_back({copies.input.data() + tile.first, 0, 0, taps_stride(), 0});
      } else if (copied) {
        copies.tiles.push_back(fill_panel(unit, tile, panel));
        panel += elements * tile.vectors * kLanes;
      } else if constexpr (std::is_same_v<T, P>) {
        const T* first_image = x_.data() + unit.image * image;
        copies.tiles.push_back({first_image + tile.first, image, row, p_.input_channels, 0});
      }
    }
  }

  // Where a unit's operands lie, for some blocks and for some tiles.
  Region<T> region_of_grad(const Unit& unit, int64_t first, int64_t last) const {
    const int64_t plane = p_.h.output * p_.w.output, from = unit.top * p_.w.output;
    const int64_t begin = blocks_[first].first;
    const int64_t end = blocks_[last - 1].first + blocks_[last - 1].size;
    const T* images = grad_ + unit.image * plane * p_.output_channels;
    if (channels_last_) {
      const int64_t channel = p_.active[begin];
      return {images + from * p_.output_channels + channel,
              1,
              0,
              pixels_of(unit),
              p_.output_channels,
              p_.active[end - 1] + 1 - channel,
              nullptr};
    }
    return {images + from,    unit.images, p_.output_channels * plane,
            end - begin,      plane,       (unit.bottom - unit.top) * p_.w.output,
            p_.active + begin};
  }

  Region<T> region_of_input(const Unit& unit, int64_t first, int64_t last) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t from = begin * step_h_ * p_.w.input;
    const int64_t count = std::min(p_.h.input, end * step_h_) * p_.w.input - from;
    const int64_t plane = p_.h.input * p_.w.input;
    const int64_t channel = taps_as_channels_ ? 0 : tiles_[first].first;
    const int64_t channels = taps_as_channels_ ? p_.input_channels : channels_of(first, last);
    const T* images = x_.data() + unit.image * plane * p_.input_channels;
    if (channels_last_) {
      return {images + from * p_.input_channels + channel,
              unit.images,
              plane * p_.input_channels,
              count,
              p_.input_channels,
              channels,
              nullptr};
    }
    return {images + channel * plane + from,
            unit.images,
            p_.input_channels * plane,
            channels,
            plane,
            count,
            nullptr};
  }

  // The active channels of each block, side by side in every element; block after block. Of pixels
  // that are new to the caches, some are fetched ahead.
  void pack_grad(const Unit& unit, int64_t first, int64_t last, bool are_new,
                 Scratch<P>& packed) const {
    const int64_t plane = p_.h.output * p_.w.output, from = unit.top * p_.w.output;
    const int64_t count = (unit.bottom - unit.top) * p_.w.output;
    const int64_t channels =
        blocks_[last - 1].first + blocks_[last - 1].size - blocks_[first].first;
    const Runs runs = runs_of(unit);
    const Pairing pairs{1, apart_};
    P* to = packed.at_least(elements_of(unit) * channels + kSlack);
    if (channels_last_) {
      gather_grad(grad_ + (unit.image * plane + from) * p_.output_channels, runs, first, last,
                  are_new, to);
      return;
    }
    const int64_t run = std::min(runs.pixels, count);
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_[b];
      for (int64_t image = unit.image; image < unit.image + unit.images; ++image) {
        const T* planes[kMostRows];
        for (int64_t k = 0; k < block.size; ++k) {
          planes[k] = grad_ + (image * p_.output_channels + p_.active[block.first + k]) * plane;
        }
        for (int64_t i = 0; i < count; i += run) {
          interleave_pixels<T, P>(planes, block.size, from + i, run, to, pairs);
          to += pairs.elements(run) * block.size;
        }
      }
    }
  }

  void add_bias(const Unit& unit, int64_t first, int64_t last, const Scratch<P>& packed,
                double* bias) const {
    const P* dy = packed.data();
    const Runs runs = runs_of(unit);
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks_[b];
      for (int64_t run = 0; run < runs.count; ++run) {
        k_.sum_pixels(dy, block.size, runs.pixels, apart_, bias + block.first);
        dy += divided_up(runs.pixels, apart_) * block.size;
      }
    }
  }

  // For the output pixels of a unit the channels that its taps read, tap after tap, zeros where
  // they read beside the input.
  void fill_taps(const Unit& unit, Copies<P>& copies) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t channels = p_.input_channels, reach = (p_.w.kernel - 1) * p_.w.dilation + 1;
    const int64_t row = ((p_.w.output - 1) * p_.w.stride + reach) * channels;
    const int64_t left = std::min(p_.w.padding * channels, row);
    const int64_t columns = std::min(p_.w.input, (row - left) / channels);
    const int64_t stride = taps_stride(), elements = divided_up(p_.w.output, apart_);
    // One row of zeros follows the others.
    P* all_rows = copies.rows.at_least((end - begin + 1) * row + taps_stride());
    P* to = copies.input.at_least(elements_of(unit) * stride + kLanes);
    std::fill_n(all_rows + (end - begin) * row, row + taps_stride(), P(0));
    for (int64_t i = unit.image; i < unit.image + unit.images; ++i) {
      P* rows = all_rows;
      for (int64_t y = begin; y < end; ++y, rows += row) {
        std::fill_n(rows, left, P(0));
        x_.copy(i, 0, {y * p_.w.input, 1, 0, columns, 1}, rows + left, channels, {0, 1});
        std::fill_n(rows + left + columns * channels, row - left - columns * channels, P(0));
        if constexpr (kIsPair<P>) k_.pair_up(rows, row, p_.w.stride * channels);
      }
      for (int64_t p = unit.top; p < unit.bottom; ++p, to += elements * stride) {
        for (int64_t r = 0; r < p_.h.kernel; ++r) {
          const int64_t y = p * p_.h.stride - p_.h.padding + r * p_.h.dilation;
          const bool inside = begin <= y && y < end;
          copy_taps(all_rows + (inside ? y - begin : end - begin) * row,
                    to + r * p_.w.kernel * channels);
        }
      }
    }
  }

 private:
  int64_t pixels() const { return p_.images * p_.h.output * p_.w.output; }

  std::vector<Tile> tiles_of_channels() const {
    if (planes_) return channel_tiles(padded_, kLanes, 1, 1);
    const TileLimits& limits = k_.tile_limits;
    const int64_t rows = divided_up(p_.n, divided_up(p_.n, limits.rows));
    return channel_tiles(padded_, kLanes,
                         reads_in_place() ? limits.widest_in_cache(rows) : limits.widest(rows),
                         limits.vectors_of_register);
  }

  int64_t pixels_per_unit() const {
    if (planes_) return kBytesOfPlane / static_cast<int64_t>(sizeof(T));
    return p_.images > 1 && pixels() <= kFewPixels ? kPixelsPerSmallUnit : kPixelsPerUnit;
  }

  // A power of two, so that threads get equal shares.
  int64_t number_of_parts() const {
    const int64_t sums = p_.n * size_of_sums();
    const int64_t most =
        std::min({std::clamp(kCachedSums / sums, kParts, kMostParts), kSumsOfAllParts / sums,
                  static_cast<int64_t>(products() / kProductsPerPart), pixels() / kPixelsPerPart});
    int64_t parts = 1;
    while (2 * parts <= most) parts *= 2;
    return parts;
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

  int64_t channels_of(int64_t first, int64_t last) const {
    return tiles_[last - 1].first + tiles_[last - 1].vectors * kLanes - tiles_[first].first;
  }

  // So many rows of x, of an image.
  int64_t elements_of_panel(int64_t rows) const {
    return pairs_cross_rows() ? divided_up(rows * panel_columns(), apart_)
                              : rows * divided_up(panel_columns(), apart_);
  }

  // Whether a panel would hold what lies in memory.
  bool lies_side_by_side() const {
    const int64_t rows = divided_up(p_.n, static_cast<int64_t>(blocks_.size()));
    return p_.input_channels % kLanes == 0 &&
           p_.input_channels <= k_.tile_limits.widest(rows) * kLanes;
  }

  bool takes_all_pixels() const { return step_h_ == 1 && step_w_ == 1; }

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

  // A few pixels of all blocks at a time: they lie in the first cache.
  void gather_grad(const T* pixels, const Runs& runs, int64_t first, int64_t last, bool are_new,
                   P* to) const {
    const Pairing pairs{1, apart_};
    const int64_t of_run = pairs.elements(runs.pixels), whole = pairs.whole<P>(runs.pixels);
    const int64_t elements = runs.count * of_run, together = kPixelsTogether / apart_;
    const int64_t pixel = p_.output_channels;
    int64_t begin = 0;
    const int64_t far = are_new ? far_ahead<T>(apart_ * pixel) : 0;
    const auto gather = [&](int64_t i, int64_t some, int64_t next) {
      P* packed = to;
      for (int64_t b = first; b < last; ++b) {
        const Block& block = blocks_[b];
        k_.gather(block.plan.get((elements - begin - i - some) * block.size, next, far),
                  pixels + i * apart_ * pixel, apart_ * pixel, packed + (begin + i) * block.size,
                  block.size, some);
        packed += elements * block.size;
      }
    };
    for (; begin < elements; begin += of_run, pixels += runs.pixels * pixel) {
      for (int64_t i = 0; i < whole; i += together) {
        gather(i, std::min(together, whole - i), pixel);
      }
      if (whole < of_run) gather(whole, 1, 0);
    }
  }

  // The input rows of a unit with the tile's channels side by side.
  Pixels<P> fill_panel(const Unit& unit, const Tile& tile, P* panel) const {
    int64_t begin, end;
    rows_read(unit, begin, end);
    const int64_t width = tile.vectors * kLanes, columns = panel_columns();
    const int64_t row = columns * width, image = elements_of_panel(end - begin) * width;
    const Pairing pairs{next_pixel(), apart_};
    for (int64_t i = 0; i < unit.images; ++i) {
      P* to = panel + i * image;
      if (takes_all_pixels()) {
        const PixelGrid all{begin * columns, 1, 0, (end - begin) * columns, 1};
        x_.copy(unit.image + i, tile.first, all, to, width, pairs);
      } else {
        const int64_t source_row = step_h_ * p_.w.input;
        const PixelGrid some{begin * source_row, end - begin, source_row, columns, step_w_};
        x_.copy(unit.image + i, tile.first, some, to, width, pairs);
      }
    }
    return {panel, image, row, width, begin};
  }

  // One row of taps for one row of elements. Vectors are copied whole: what is written past the
  // end, the next row of taps overwrites.
  void copy_taps(const P* row, P* to) const {
    const bool neighbours = p_.w.dilation == 1;
    const int64_t length = p_.input_channels * (neighbours ? p_.w.kernel : 1);
    for (int64_t s = 0; s < (neighbours ? 1 : p_.w.kernel); ++s) {
      k_.copy_pixels(row + s * p_.w.dilation * p_.input_channels,
                     apart_ * p_.w.stride * p_.input_channels, divided_up(length, kLanes),
                     divided_up(p_.w.output, apart_), to + s * length, taps_stride(), 0);
    }
  }

  const ConvProblem& p_;
  const T* grad_;
  const SideBySide<T, P> x_;
  bool channels_last_;
  const DirectKernels<T, P>& k_;
  bool planes_;
  std::vector<Block> blocks_;
  bool taps_as_channels_, panels_;
  int64_t step_h_, step_w_, apart_;
  int64_t channels_, padded_;
  std::vector<Tile> tiles_;
  int64_t parts_, band_rows_, bands_, images_;
};

}  // namespace neq
