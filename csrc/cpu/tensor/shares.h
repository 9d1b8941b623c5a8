// How work is shared out among threads: plain arithmetic, so that a test asks for any number of
// threads. What a share computes does not depend on the shares, so neither do the bits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace neq {

// Two threads never write to the same line: it would go back and forth between their caches.
constexpr int64_t kLineBytes = 64;

// The largest share over the mean of the shares.
constexpr double kMostUneven = 1.15;

// Of memory to copy, clear or step through: 32 to 128 kB, some microseconds, which is what it costs
// to wake a thread and to wait for it.
constexpr int64_t kLeastElements = 16384;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range share_of(int64_t length, int64_t i, int64_t shares) {
  return {length * i / shares, length * (i + 1) / shares};
}

// As many rows of `elements` as are whole lines together.
inline int64_t rows_of_whole_lines(int64_t elements, int64_t item_bytes) {
  int64_t rows = 1;
  while (rows * elements * item_bytes % kLineBytes != 0) rows *= 2;
  return rows;
}

// Elements up to the end of a line.
inline int64_t whole_lines(int64_t elements, int64_t item_bytes) {
  const int64_t line = kLineBytes / item_bytes;
  return (elements + line - 1) / line * line;
}

// As many of `threads` as get a share of at least `least`.
inline int64_t worthwhile(int64_t threads, int64_t work, int64_t least) {
  return std::clamp<int64_t>(work / least, 1, threads);
}

// The most shares, of `most` and its halves, that are even: largest(shares) is the largest of them.
template <class Largest>
int64_t even_shares(int64_t most, int64_t work, const Largest& largest) {
  while (most > 1 && static_cast<double>(largest(most) * most) > kMostUneven * work) most /= 2;
  return most;
}

// Calls f(share) for every share, each on a thread of its own where there are as many.
template <class F>
void for_each_share(int64_t shares, const F& f) {
  if (shares == 1) return f(int64_t{0});
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) f(share);
  });
}

// Work that lies in a row of pieces, each of which stays whole.
class Cuts {
 public:
  // before[i] lies before piece i; the last one is everything.
  Cuts() = default;
  explicit Cuts(std::vector<int64_t> before) : before_(std::move(before)) {}

  int64_t pieces() const { return static_cast<int64_t>(before_.size()) - 1; }
  int64_t total() const { return before_.back(); }
  Range share(int64_t i, int64_t shares) const { return share_of(pieces(), i, shares); }
  int64_t work(Range pieces) const { return before_[pieces.end] - before_[pieces.begin]; }

  struct Extent {
    int64_t largest, smallest;
  };
  Extent extent(int64_t shares) const {
    Extent extent{0, total()};
    for (int64_t i = 0; i < shares; ++i) {
      const int64_t one = work(share(i, shares));
      extent = {std::max(extent.largest, one), std::min(extent.smallest, one)};
    }
    return extent;
  }

  // The numbers of shares, up to `most`, that are worth a thought: with fewer of them the largest
  // share is larger.
  std::vector<int64_t> numbers(int64_t most) const {
    std::vector<int64_t> numbers;
    for (int64_t n = 1; n <= std::min(most, pieces()); ++n) {
      const int64_t size = (pieces() + n - 1) / n;
      if (n == 1 || size < (pieces() + n - 2) / (n - 1)) numbers.push_back(n);
    }
    return numbers;
  }

 private:
  std::vector<int64_t> before_;
};

}  // namespace neq
