// How a reduction is cut into parts, which blocks compute at the same time: their sums are written,
// and added by a second kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/ceil_div.h"

namespace neq::cuda {

// Blocks for each multiprocessor: so that some compute while others wait for memory.
constexpr int64_t kBlocksEach = 2, kPackBlocksEach = 3;
// Each block first finds its neurons, fills its stages and reads what borders on its rows: these
// are to be at least so many of the tile's.
constexpr int64_t kLeastSteps = 6;
// So that the sums of all parts stay in L2.
constexpr int64_t kMostSumsBytes = 16 << 20;

// Of `t` rows, that many at a step.
inline int64_t pack_blocks(int64_t t, int64_t rows, int64_t multiprocessors) {
  return std::min(ceil_div(t, kLeastSteps * rows), kPackBlocksEach * multiprocessors);
}

// Parts of a sum over t rows, of which each has a multiple of the tile's.
struct SplitK {
  int64_t parts, per_part;

  // A block reads `row_bytes` of each of its rows, and of all tiles a part has `sums_bytes`. With p
  // parts blocks take, if each has a multiprocessor's share of the memory's bandwidth B,
  //
  //   multiprocessors * t * row_bytes / (p * B), and the sums 2 * p * sums_bytes / (2 * B),
  //
  // because they are written, read again, and stay in L2, which is about twice as fast. That is
  // least where both are equal.
  SplitK(int64_t t, int64_t rows, int64_t row_bytes, int64_t sums_bytes, int64_t tiles,
         int64_t multiprocessors) {
    const double operands =
        static_cast<double>(multiprocessors * t) * static_cast<double>(row_bytes);
    const auto fastest =
        static_cast<int64_t>(std::sqrt(operands / static_cast<double>(sums_bytes)));
    const int64_t wanted = ceil_div(kBlocksEach * multiprocessors, tiles);
    const int64_t most =
        std::min({t / (kLeastSteps * rows), fastest, wanted, kMostSumsBytes / sums_bytes});
    per_part = ceil_div(ceil_div(t, std::max(most, int64_t{1})), rows) * rows;
    parts = ceil_div(t, per_part);
  }
};

}  // namespace neq::cuda
