// The pixels that the direct wgrad takes at a time, and copies of them.
#pragma once

#include <cstdint>

#include "../tensor/scratch.h"

namespace neq {

// Output rows [top, bottom) of some images.
struct Unit {
  int64_t image, images, top, bottom;
};

// `count` times so many pixels of a unit that make pairs with each other; of an odd number the last
// one makes none.
struct Runs {
  int64_t count, pixels;
};

// Some channels of x at the pixels of a unit; the first row in memory is row `begin`.
template <class P>
struct Pixels {
  const P* data;
  int64_t image, row, pixel, begin;
};

// Copies of a unit's operands: dy block by block, x with some channels side by side, and rows of x.
template <class P>
struct Copies {
  Scratch<P> grad, input, rows;
  LineVector<Pixels<P>> tiles;
};

}  // namespace neq
