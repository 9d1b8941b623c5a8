// A weight gradient shared out among threads, row by row: those of active and of frozen output
// channels cost differently, and shares end where lines do. So rows are taken as they lie in
// memory, unless they are whole lines: then by p.active, the active ones first.
#pragma once

#include <algorithm>

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
    if (as_in_memory() && !is_ascending()) {
      shares_ = 1;
      return;
    }
    shares_ = even_shares(shares_, work_, [&](int64_t shares) {
      shares_ = shares;
      return extent_of(shares, [&](int64_t i, int64_t) { return work_before(begin_of(i)); })
          .largest;
    });
  }

  int64_t shares() const { return shares_; }

  int64_t work(int64_t share) const {
    return work_before(begin_of(share + 1)) - work_before(begin_of(share));
  }

  // Calls write(slot, channels) for active rows, and clear(slot, rows, channels) for frozen ones,
  // neighbours together; the output channel of the first is p.active[slot].
  template <class Write, class Clear>
  void visit(int64_t share, const Write& write, const Clear& clear) const {
    Place begin = begin_of(share);
    const Place end = begin_of(share + 1);
    const Range all{0, p_.input_channels};
    if (shares_ > 1 && as_in_memory()) {
      const Range active{active_before(begin.row), active_before(end.row)};
      for (int64_t slot = active.begin; slot < active.end; ++slot) write(slot, all);
      clear_runs({p_.n + begin.row - active.begin, p_.n + end.row - active.end}, clear);
      return;
    }
    const auto visit_some = [&](int64_t slot, Range channels) {
      if (channels.size() == 0) return;
      slot < p_.n ? write(slot, channels) : clear(slot, int64_t{1}, channels);
    };
    if (begin.channel > 0) {
      const bool ends = begin.row == end.row;
      visit_some(begin.row, {begin.channel, ends ? end.channel : p_.input_channels});
      if (ends) return;
      ++begin.row;
    }
    for (int64_t slot = begin.row; slot < std::min(end.row, p_.n); ++slot) write(slot, all);
    clear_runs({std::max(begin.row, p_.n), end.row}, clear);
    visit_some(end.row, {0, end.channel});
  }

 private:
  struct Place {
    int64_t row, channel;
  };

  bool as_in_memory() const { return rows_together_ > 1; }

  bool is_ascending() const {
    const int64_t* frozen = p_.active + p_.n;
    return std::is_sorted(p_.active, frozen) &&
           std::is_sorted(frozen, p_.active + p_.output_channels);
  }

  template <class Clear>
  void clear_runs(Range slots, const Clear& clear) const {
    for (int64_t slot = slots.begin, next = slot; slot < slots.end; slot = next) {
      do ++next;
      while (next < slots.end && p_.active[next] == p_.active[next - 1] + 1);
      clear(slot, next - slot, Range{0, p_.input_channels});
    }
  }

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

  int64_t active_before(int64_t row) const {
    if (!as_in_memory()) return std::min(row, p_.n);
    return std::lower_bound(p_.active, p_.active + p_.n, row) - p_.active;
  }

  // What rows cost up to this one.
  int64_t before(int64_t row) const {
    const int64_t active = active_before(row);
    return row_ * (active * active_cost_ + (row - active) * frozen_cost_);
  }

  int64_t work_before(Place place) const {
    if (place.channel == 0) return before(place.row);
    return before(place.row) +
           (before(place.row + 1) - before(place.row)) * place.channel / p_.input_channels;
  }

  const ConvProblem& p_;
  int64_t row_, active_cost_, frozen_cost_, work_, shares_ = 1, step_ = 0, rows_together_ = 1;
};

}  // namespace neq
