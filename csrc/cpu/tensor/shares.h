// How work is shared out among threads: plain arithmetic, so that a test asks for any number of
// threads. What a share computes does not depend on the shares, so neither do the bits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

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

// The largest and the smallest share, where before(i, shares) is the work before share i.
struct Extent {
  int64_t largest, smallest;
};

template <class Before>
Extent extent_of(int64_t shares, const Before& before) {
  Extent extent{0, before(shares, shares)};
  for (int64_t i = 0, begin = 0; i < shares; ++i) {
    const int64_t end = before(i + 1, shares);
    extent = {std::max(extent.largest, end - begin), std::min(extent.smallest, end - begin)};
    begin = end;
  }
  return extent;
}

// Whether so many shares of `pieces` have a smaller largest one than fewer shares.
inline bool is_worth_a_share_more(int64_t shares, int64_t pieces) {
  return shares == 1 || (pieces + shares - 1) / shares < (pieces + shares - 2) / (shares - 1);
}

}  // namespace neq
