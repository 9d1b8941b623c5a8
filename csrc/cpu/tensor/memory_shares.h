// A piece of memory that is written from end to end, shared out in whole lines.
#pragma once

#include "shares.h"

namespace neq {

// `rows` rows of `elements` each; shares begin with a row, or, with cut_rows, with a line.
class MemoryShares {
 public:
  MemoryShares(int64_t rows, int64_t elements, int64_t item_bytes, bool cut_rows, int64_t threads)
      : unit_(cut_rows ? kLineBytes / item_bytes
                       : elements * rows_of_whole_lines(elements, item_bytes)),
        total_(rows * elements) {
    const auto largest = [&](int64_t shares) {
      shares_ = shares;
      int64_t largest = 0;
      for (int64_t i = 0; i < shares; ++i) largest = std::max(largest, share(i).size());
      return largest;
    };
    shares_ = even_shares(worthwhile(threads, total_, kLeastElements), total_, largest);
  }

  int64_t shares() const { return shares_; }

  // In elements.
  Range share(int64_t i) const { return {begin_of(i), begin_of(i + 1)}; }

 private:
  int64_t begin_of(int64_t i) const {
    if (i == shares_) return total_;
    return std::min(total_, (total_ * i / shares_ + unit_ / 2) / unit_ * unit_);
  }

  int64_t unit_, total_, shares_ = 1;
};

}  // namespace neq
