// Which columns to gather, prepared once and used for every row.
#pragma once

#include <vector>

#include "../simd/kernels.h"

namespace neq {

class ColumnGatherPlan {
 public:
  // columns[:n], each in [0, width) and in any order; the pointer is kept. Rows of the result lie
  // at least n words apart. columns[n : n + soon] are prefetched.
  ColumnGatherPlan(const int64_t* columns, int64_t n, int64_t width, int64_t word_bytes,
                   int64_t soon = 0);

  // Behind the last row, `room` words may be overwritten. Pairs are made of words `next` apart.
  // What lies `far` words ahead is fetched.
  ColumnGather get(int64_t room = 0, int64_t next = 0, int64_t far = 0) const {
    return {columns_,    n_,          windows_.data(), static_cast<int64_t>(windows_.size()),
            one_vector_, soon_first_, soon_last_,      room,
            next,        far};
  }

 private:
  const int64_t* columns_;
  int64_t n_;
  std::vector<Window> windows_;
  bool one_vector_ = false;
  int64_t soon_first_ = 0, soon_last_ = -1;
};

}  // namespace neq
