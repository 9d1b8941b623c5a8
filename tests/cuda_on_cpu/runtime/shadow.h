// Who accessed which bytes last.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "history.h"

namespace neq::emu {

struct Cell {
  Users writes, reads;
  uint32_t earlier_reads;  // by other blocks: the head of a list
};

// One cell for every `granule` bytes. Sixteen bytes that were never accessed in part share the
// first one's.
class Shadow {
 public:
  Shadow(uintptr_t base, size_t bytes, size_t granule)
      : base_(base),
        granule_(granule),
        per_line_(granule < kLine ? kLine / granule : 1),
        is_split_(bytes / (granule * per_line_) + 1),
        cells_(static_cast<Cell*>(std::calloc(is_split_.size() * per_line_, sizeof(Cell)))) {}

  // Calls visit(cell, address) for the cells of these bytes, one call for those that share one.
  // `overwrites`: they are equal afterwards.
  template <class F>
  void visit(uintptr_t address, size_t bytes, bool overwrites, const F& visit) {
    const size_t first = (address - base_) / granule_;
    const size_t last = (address + bytes - 1 - base_) / granule_;
    for (size_t i = first; i <= last;) {
      const size_t line = i / per_line_, begin = line * per_line_, end = begin + per_line_;
      const bool whole = i == begin && last + 1 >= end;
      if (!whole && !is_split_[line]) {
        for (size_t j = begin + 1; j < end; ++j) cells_[j] = cells_[begin];
        is_split_[line] = true;
      }
      if (!is_split_[line]) {
        visit(cells_[begin], base_ + begin * granule_);
        i = end;
        continue;
      }
      for (; i < end && i <= last; ++i) visit(cells_[i], base_ + i * granule_);
      if (whole && overwrites) is_split_[line] = false;
    }
  }

 private:
  static constexpr size_t kLine = 16;
  struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
  };

  uintptr_t base_;
  size_t granule_, per_line_;
  std::vector<uint8_t> is_split_;
  std::unique_ptr<Cell[], Free> cells_;
};

}  // namespace neq::emu
