// Loops over pixels that go on where the one inside of them ends become one.
#pragma once

#include <utility>

#include "../simd/kernels.h"

namespace neq {

template <class P>
void join_loops(OuterProduct<P>& o) {
  if (o.images == 1 || (o.dy_image == o.rows * o.dy_row && o.x_image == o.rows * o.x_row)) {
    o.rows *= o.images;
    o.images = 1;
  }
  if (o.columns == 1) {
    o.dy_column = o.dy_row;
    o.x_column = o.x_row;
    std::swap(o.rows, o.columns);
  } else if (o.dy_row == o.columns * o.dy_column && o.x_row == o.columns * o.x_column) {
    o.columns *= o.rows;
    o.rows = 1;
  }
}

// Where the last pixel of the inner loop makes a pair with the first one of its next run, or with
// one of its own. A pixel of x makes a pair with the one x_next behind it, across rows where they
// are said to be crossed, and never across images.
inline void join_loops_of_pairs(OuterProduct<Pair>& o, int64_t x_next, bool cross_rows) {
  if (o.columns == 1) {
    if (cross_rows && o.x_row == x_next && o.dy_row == o.dy_column) {
      o.x_column = o.x_row;
      std::swap(o.rows, o.columns);
    }
  } else if (o.dy_row == o.columns * o.dy_column && o.x_row == o.columns * o.x_column &&
             (cross_rows || o.columns % 2 == 0)) {
    o.columns *= o.rows;
    o.rows = 1;
  }
  if (o.rows == 1 && o.columns % 2 == 0 && o.dy_image == o.columns * o.dy_column &&
      o.x_image == o.columns * o.x_column) {
    o.columns *= o.images;
    o.images = 1;
  }
}

}  // namespace neq
