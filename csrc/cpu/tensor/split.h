// The split of a reduction: it depends on the shape alone, so any number of threads gives the same
// bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace neq {

struct Split {
  Split(int64_t length, int64_t most_parts, int64_t least_size)
      : length(length),
        size(std::max(least_size, (length + most_parts - 1) / std::max<int64_t>(1, most_parts))),
        parts((length + size - 1) / size) {}

  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part) const { return std::min(length, (part + 1) * size); }

  int64_t length, size, parts;
};

}  // namespace neq
