// How the direct wgrad cuts channels: those of x into tiles, the active ones of dy into blocks.
#pragma once

#include <algorithm>
#include <vector>

#include "../simd/kernels.h"
#include "column_gather.h"
#include "convolution.h"

namespace neq {

// Some vectors of channels. Where the last tile would pass the end it begins earlier, and leaves
// `skip` lanes out.
struct Tile {
  int64_t first, vectors, skip;
};

// Of at most `widest` vectors, as many as make whole registers.
inline std::vector<Tile> channel_tiles(int64_t channels, int64_t lanes, int64_t widest,
                                       int64_t vectors_of_register) {
  std::vector<Tile> tiles;
  for (int64_t c = 0; c < channels;) {
    const int64_t left = channels - c;
    if (left < lanes) {
      tiles.push_back({channels - lanes, 1, lanes - left});
      break;
    }
    // Of about the same width, of whole registers if they can. Two and one are slower than three.
    const int64_t all = left / lanes, even = divided_up(all, divided_up(all, widest));
    const int64_t registers = divided_up(even, vectors_of_register);
    const int64_t vectors = std::min(all, registers * vectors_of_register);
    tiles.push_back({c, all == 3 ? 3 : vectors, 0});
    c += tiles.back().vectors * lanes;
  }
  return tiles;
}

// Active channels whose sums are in registers at the same time.
struct Block {
  int64_t first, size;
  ColumnGatherPlan plan;
};

inline std::vector<Block> channel_blocks(const ConvProblem& p, int64_t word_bytes, int64_t rows) {
  std::vector<Block> blocks;
  int64_t first = 0;
  for (int64_t left = divided_up(p.n, rows); left > 0; --left) {
    const int64_t size = divided_up(p.n - first, left);
    const int64_t soon = std::min(size, p.n - first - size);
    blocks.push_back(
        {first, size,
         ColumnGatherPlan(p.active + first, size, p.output_channels, word_bytes, soon)});
    first += size;
  }
  return blocks;
}

}  // namespace neq
