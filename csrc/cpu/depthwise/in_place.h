// Direct depthwise wgrad in NHWC that reads dY and x where they lie: by vectors of neighbouring
// channels, of which at least one is active.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../conv/convolution.h"
#include "../simd/kernels.h"
#include "partial.h"
#include "schedule.h"
#include "sums.h"

namespace neq::depthwise {

template <class T>
class InPlace {
 public:
  static constexpr int64_t kLanes = Sums<T>::kLanes;

  static bool supports(const ConvProblem& p) {
    return p.multiplier() == 1 && p.output_channels >= kLanes;
  }

  explicit InPlace(const ConvProblem& problem)
      : p_(problem), k_(kernels<T>()), windows_(p_.w.output, (p_.w.output - 1) / kWindow + 1, 1) {
    find_vectors();
    const int64_t c = p_.input_channels, x_row = p_.w.input * c;
    steps_ = {p_.w.output * c,       c,
              p_.h.stride * x_row,   p_.w.stride * c,
              p_.h.dilation * x_row, p_.w.dilation * c,
              p_.w.kernel * kLanes};
    const int64_t groups = (p_.w.kernel - 1) / kMostTapColumns + 1;
    const Split columns(p_.w.kernel, groups, 1);
    column_pieces_.resize(windows_.parts);
    for (int64_t window = 0; window < windows_.parts; ++window) {
      add_pieces(p_.w, columns, windows_.begin(window), windows_.end(window),
                 column_pieces_[window]);
    }
    const int64_t most = most_tap_rows(columns.size);
    add_pieces(p_.h, Split(p_.h.kernel, (p_.h.kernel - 1) / most + 1, 1), 0, p_.h.output,
               row_pieces_);
    height_ = affordable_height();
  }

  // Than gathering the active channels into as few vectors as there can be.
  bool is_cheaper() const {
    const int64_t packed = (p_.n - 1) / kLanes + 1;
    const int64_t copied = p_.h.output * p_.w.output + p_.h.input * p_.w.input;
    const int64_t products = p_.taps() * p_.h.output * p_.w.output;
    return vectors() * products <= packed * (products + kProductsPerCopy * copied);
  }

  Schedule schedule(int64_t threads) const {
    return {parts(), vectors(), kLanes * vectors() * p_.outputs() * p_.taps(), threads};
  }

  std::vector<int64_t> slots_of(int64_t vector) const {
    return {by_channel_.begin() + vectors_[vector].begin,
            by_channel_.begin() + vectors_[vector].end};
  }

  void add(const T* grad, const T* input, Partial& partial) const {
    const Split units = parts();
    const Schedule shares = schedule(torch::stable::get_num_threads());
    partial.resize(units.parts);
    for_each_share(shares.shares(), [&](int64_t i) {
      const Share share = shares.share(i);
      const int64_t groups = (share.vectors.size() - 1) / kGroup + 1;
      LineVector<Sums<T>> sums((share.vectors.size() - 1) / groups + 1, Sums<T>(p_.taps()));
      for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
        for (int64_t group = 0; group < groups; ++group) {
          const Range some = share_of(share.vectors.size(), group, groups);
          const int64_t first = share.vectors.begin;
          add_part(grad, input, part, {first + some.begin, first + some.end}, sums, partial);
        }
      }
    });
  }

 private:
  static constexpr int64_t kWindow = 128;     // output columns at a time
  static constexpr int64_t kGroup = 16;       // vectors that are done for a band before the next
  static constexpr int64_t kBandLines = 384;  // that a vector touches in a band: most of an L1
  // Copying a vector takes as long as so many products, measured.
  static constexpr int64_t kProductsPerCopy = 9;

  // A vector from `channel` on; by_channel_[begin : end] are its active channels.
  struct ChannelVector {
    int64_t channel, begin, end;
  };

  int64_t bands() const { return (p_.h.output - 1) / height_ + 1; }

  Split parts() const {
    const int64_t least_bands = (kLeastPixels - 1) / (height_ * p_.w.output) + 1;
    return parts_of(p_.images * bands(), least_bands, vectors(),
                    kLanes * vectors() * p_.outputs() * p_.taps());
  }

  void add_part(const T* grad, const T* input, int64_t part, Range vectors,
                LineVector<Sums<T>>& sums, Partial& partial) const {
    const int64_t first = vectors.begin, last = vectors.end;
    const Split units = parts();
    for (Sums<T>& of_vector : sums) of_vector.clear();
    for (int64_t unit = units.begin(part); unit < units.end(part); ++unit) {
      const int64_t image = unit / bands(), top = unit % bands() * height_;
      const T* dy = grad + image * p_.h.output * p_.w.output * p_.output_channels;
      const T* x = input + image * p_.h.input * p_.w.input * p_.input_channels;
      for (int64_t v = first; v < last; ++v) {
        const int64_t channel = vectors_[v].channel;
        add(dy + channel, x + channel, top, std::min(top + height_, p_.h.output), sums[v - first]);
      }
    }
    for (int64_t v = first; v < last; ++v) {
      const ChannelVector& vector = vectors_[v];
      for (int64_t i = vector.begin; i < vector.end; ++i) {
        const int64_t slot = by_channel_[i];
        sums[v - first].add_lane(p_.active[slot] - vector.channel, partial.fresh_row(part, slot));
      }
    }
  }

  int64_t vectors() const { return static_cast<int64_t>(vectors_.size()); }

  void find_vectors() {
    by_channel_.resize(p_.n);
    std::iota(by_channel_.begin(), by_channel_.end(), 0);
    const auto channel = [&](int64_t i) { return p_.active[by_channel_[i]]; };
    std::sort(by_channel_.begin(), by_channel_.end(),
              [&](int64_t a, int64_t b) { return p_.active[a] < p_.active[b]; });
    for (int64_t i = 0; i < p_.n;) {
      const int64_t from = std::min(channel(i) / kLanes * kLanes, p_.output_channels - kLanes);
      const int64_t begin = i;
      while (i < p_.n && channel(i) < from + kLanes) ++i;
      vectors_.push_back({from, begin, i});
    }
  }

  // Neighbouring outputs [first, last) for which the same taps [tap, tap_end) of a group of taps
  // read inside the input.
  struct Piece {
    int64_t first, last, tap, tap_end;
  };

  static void add_pieces(const Axis& axis, const Split& taps, int64_t first, int64_t last,
                         std::vector<Piece>& pieces) {
    for (int64_t group = 0; group < taps.parts; ++group) {
      Piece piece{first, first, 0, 0};
      for (int64_t output = first; output < last; ++output) {
        int64_t tap = taps.begin(group), tap_end = taps.end(group);
        while (tap < tap_end && output < axis.begin(tap)) ++tap;
        while (tap < tap_end && output >= axis.end(tap_end - 1)) --tap_end;
        if (tap != piece.tap || tap_end != piece.tap_end) {
          if (piece.tap < piece.tap_end) pieces.push_back(piece);
          piece = {output, output, tap, tap_end};
        }
        piece.last = output + 1;
      }
      if (piece.tap < piece.tap_end) pieces.push_back(piece);
    }
  }

  // Of a band: so that what one vector reads of it stays in the first cache for all taps.
  int64_t affordable_height() const {
    const int64_t out_row = windows_.size;
    const int64_t in_row =
        std::min(p_.w.input, out_row * p_.w.stride + (p_.w.kernel - 1) * p_.w.dilation);
    const int64_t in_rows_more = (p_.h.kernel - 1) * p_.h.dilation + 1 - p_.h.stride;
    const int64_t affordable =
        (kBandLines - in_rows_more * in_row) / (out_row + p_.h.stride * in_row);
    const int64_t most =
        std::clamp<int64_t>(std::min(affordable, Sums<T>::kMostVectors / out_row), 1, p_.h.output);
    return Split(p_.h.output, (p_.h.output - 1) / most + 1, 1).size;
  }

  // Output rows [top, bottom) of an image; dy and x point to the vector in its first pixel.
  void add(const T* dy, const T* x, int64_t top, int64_t bottom, Sums<T>& sums) const {
    for (int64_t window = 0; window < windows_.parts; ++window) {
      const int64_t left = windows_.begin(window), width = windows_.end(window) - left;
      T* lanes = sums.lanes_for((bottom - top) * width);
      for (const Piece& row_piece : row_pieces_) {
        const int64_t first = std::max(top, row_piece.first);
        const int64_t rows = std::min(bottom, row_piece.last) - first;
        if (rows <= 0) continue;
        for (const Piece& column_piece : column_pieces_[window]) {
          add_piece(dy, x, row_piece, first, rows, column_piece, lanes);
        }
      }
      if (p_.want_bias) {
        const int64_t row = p_.w.output * p_.output_channels;
        const T* from = dy + top * row + left * p_.output_channels;
        k_.sum({from, row, nullptr, 0, bottom - top, width, p_.output_channels}, sums.bias_lanes());
      }
    }
  }

  void add_piece(const T* dy, const T* x, const Piece& h, int64_t row, int64_t rows, const Piece& w,
                 T* lanes) const {
    const int64_t x_row = row * p_.h.stride + h.tap * p_.h.dilation - p_.h.padding;
    const int64_t x_column = w.first * p_.w.stride + w.tap * p_.w.dilation - p_.w.padding;
    const auto correlate = k_.correlate_pixels[w.tap_end - w.tap - 1][h.tap_end - h.tap - 1];
    correlate(steps_, dy + (row * p_.w.output + w.first) * p_.output_channels,
              x + (x_row * p_.w.input + x_column) * p_.input_channels, rows, w.last - w.first,
              lanes + (h.tap * p_.w.kernel + w.tap) * kLanes);
  }

  const ConvProblem& p_;
  const Kernels<T>& k_;
  Split windows_;
  std::vector<int64_t> by_channel_;
  std::vector<ChannelVector> vectors_;
  std::vector<Piece> row_pieces_;
  std::vector<std::vector<Piece>> column_pieces_;  // of each window
  PixelSteps steps_;
  int64_t height_;
};

}  // namespace neq::depthwise
