// A weight gradient shared out among threads, row by row: those of active and of frozen output
// channels cost differently, and shares end where lines do. So rows are taken as they lie in
// memory, unless they are whole lines: then by p.active, the active ones first.
#pragma once

#include <vector>

#include "../tensor/shares.h"
#include "convolution.h"

namespace neq {

class GradientShares {
 public:
  // What an element of an active and of a frozen row costs. `cut_rows`: shares may begin inside of
  // a row, at some input channel for all taps.
  GradientShares(const ConvProblem& p, int64_t item_bytes, int64_t active_cost, int64_t frozen_cost,
                 bool cut_rows, int64_t threads)
      : p_(p),
        row_(p.taps() * p.input_channels),
        active_cost_(active_cost),
        frozen_cost_(frozen_cost),
        work_(row_ * (p.n * active_cost + (p.output_channels - p.n) * frozen_cost)) {
    shares_ = worthwhile(threads, work_, kLeastElements);
    if (shares_ == 1) return;
    const int64_t line = kLineBytes / item_bytes;
    step_ = cut_rows && p.input_channels % line == 0 ? line : p.input_channels;
    rows_together_ = rows_of_whole_lines(row_, item_bytes);
    if (rows_together_ > 1) {
      slot_of_.resize(p.output_channels);
      for (int64_t i = 0; i < p.output_channels; ++i) slot_of_[p.active[i]] = i;
      before_.resize(p.output_channels + 1);
      for (int64_t k = 0; k < p.output_channels; ++k) {
        before_[k + 1] = before_[k] + row_ * (slot_of_[k] < p.n ? active_cost : frozen_cost);
      }
    }
    shares_ = even_shares(shares_, work_, [&](int64_t shares) {
      shares_ = shares;
      int64_t largest = 0;
      for (int64_t i = 0; i < shares; ++i) {
        largest = std::max(largest, work_before(begin_of(i + 1)) - work_before(begin_of(i)));
      }
      return largest;
    });
  }

  int64_t shares() const { return shares_; }

  int64_t work(int64_t share) const {
    if (shares_ == 1) return work_;
    return work_before(begin_of(share + 1)) - work_before(begin_of(share));
  }

  // Calls f(slot, channels): that output channel is p.active[slot].
  template <class F>
  void visit(int64_t share, const F& f) const {
    if (shares_ == 1) {
      for (int64_t i = 0; i < p_.output_channels; ++i) f(i, Range{0, p_.input_channels});
      return;
    }
    const Place begin = begin_of(share), end = begin_of(share + 1);
    for (int64_t row = begin.row; row < end.row + (end.channel > 0); ++row) {
      f(slot_of_.empty() ? row : slot_of_[row],
        Range{row == begin.row ? begin.channel : 0,
              row == end.row ? end.channel : p_.input_channels});
    }
  }

 private:
  struct Place {
    int64_t row, channel;
  };

  Place begin_of(int64_t share) const {
    if (share == 0) return {0, 0};
    if (share == shares_) return {p_.output_channels, 0};
    const int64_t target = work_ * share / shares_;
    int64_t row = 0, end = p_.output_channels;
    while (row + 1 < end) {
      const int64_t middle = (row + end) / 2;
      (before(middle) <= target ? row : end) = middle;
    }
    const int64_t cost = before(row + 1) - before(row);
    if (step_ < p_.input_channels) {
      const int64_t channel = p_.input_channels * (target - before(row)) / cost / step_ * step_;
      return {row, channel};
    }
    const int64_t nearest = row + (2 * (target - before(row)) >= cost);
    return {std::min(p_.output_channels,
                     (nearest + rows_together_ / 2) / rows_together_ * rows_together_),
            0};
  }

  // What rows cost up to this one.
  int64_t before(int64_t row) const {
    if (!before_.empty()) return before_[row];
    const int64_t active = std::min(row, p_.n);
    return row_ * (active * active_cost_ + (row - active) * frozen_cost_);
  }

  int64_t work_before(Place place) const {
    if (place.channel == 0) return before(place.row);
    return before(place.row) +
           (before(place.row + 1) - before(place.row)) * place.channel / p_.input_channels;
  }

  const ConvProblem& p_;
  int64_t row_, active_cost_, frozen_cost_, work_, shares_ = 1, step_ = 0, rows_together_ = 1;
  std::vector<int64_t> slot_of_, before_;  // only where rows are no whole lines
};

}  // namespace neq
