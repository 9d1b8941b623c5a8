#include "column_gather.h"

#include <algorithm>
#include <cstring>

namespace neq {
namespace {

// The shuffle control that moves word `source` of the loaded vector to word `target`.
void set_lane(Window& window, int64_t target, int64_t source, int64_t word_bytes) {
  if (word_bytes == 2) {
    auto* bytes = reinterpret_cast<uint8_t*>(window.lanes);
    bytes[2 * target] = static_cast<uint8_t>(2 * source);
    bytes[2 * target + 1] = static_cast<uint8_t>(2 * source + 1);
    return;
  }
  const int64_t parts = word_bytes / 4;
  for (int64_t part = 0; part < parts; ++part) {
    window.lanes[target * parts + part] = static_cast<int32_t>(source * parts + part);
  }
}

}  // namespace

ColumnGatherPlan::ColumnGatherPlan(const int64_t* columns, int64_t n, int64_t width,
                                   int64_t word_bytes, int64_t soon)
    : columns_(columns), n_(n) {
  if (soon > 0) {
    const auto [first, last] = std::minmax_element(columns + n, columns + n + soon);
    soon_first_ = *first;
    soon_last_ = *last;
  }
  const int64_t lanes = word_bytes == 8 ? kWindowLanes<uint64_t> : kWindowLanes<uint32_t>;
  if (width < lanes) return;
  for (int64_t i = 0; i < n;) {
    Window window{};
    // Moved left where it would read past the end of the row.
    window.from = std::min(columns[i], width - lanes);
    window.to = i;
    int64_t taken = 0;
    while (i < n && taken < lanes && window.from <= columns[i] &&
           columns[i] < window.from + lanes) {
      set_lane(window, taken++, columns[i++] - window.from, word_bytes);
    }
    windows_.push_back(window);
  }
  one_vector_ = word_bytes == 4 && n <= lanes &&
                static_cast<int>(windows_.size()) <= kernels<float>().most_blended;
  if (!one_vector_) return;
  for (Window& window : windows_) {
    std::rotate(window.lanes, window.lanes + (lanes - window.to) % lanes, window.lanes + lanes);
    std::fill(window.later + window.to, window.later + lanes, -1);
  }
}

}  // namespace neq
