// Neurons of a parameter as runs of neighbours in memory, visited in parallel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace neq {

// Element i of part o of neuron (g, j) lies at ((g * outer + o) * per_group + j) * inner + i.
struct Blocks {
  int64_t groups, outer, per_group, inner;
  int64_t neurons() const { return groups * per_group; }
  int64_t numel() const { return groups * outer * per_group * inner; }
};

Blocks checked_blocks(const Tensor& tensor, const char* name, int64_t groups, int64_t outer,
                      int64_t per_group, int64_t inner);

// `length` neighbours of one group, from neuron `first` of that group; the first one is
// order[slot].
struct Run {
  int64_t group, first, length, slot;
};

// Runs of order[begin:end], by group. Neighbours join when their labels agree (labels[neuron];
// nullptr: always) and the run stays within max_length.
std::vector<Run> find_runs(const int64_t* order, int64_t begin, int64_t end, int64_t per_group,
                           const int64_t* labels, int64_t max_length);

// Elements handled by one call; the cut does not depend on the number of threads.
constexpr int64_t kPieceElements = 16384;
constexpr int64_t kElementsPerThread = 32768;

// Calls f(run, outer index, offset inside the run's elements, offset in memory, count) for every
// stretch of memory that the runs own, each exactly once, in parallel.
template <class F>
void for_each_piece(const Blocks& blocks, const std::vector<Run>& runs, const F& f) {
  struct Piece {
    int64_t run, begin, count;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> pieces_before_group(blocks.groups + 1, 0);
  pieces.reserve(runs.size());
  int64_t elements = 0;
  for (size_t r = 0; r < runs.size(); ++r) {
    const int64_t run_elements = runs[r].length * blocks.inner;
    elements += run_elements * blocks.outer;
    for (int64_t begin = 0; begin < run_elements; begin += kPieceElements) {
      pieces.push_back(
          {static_cast<int64_t>(r), begin, std::min(kPieceElements, run_elements - begin)});
    }
    pieces_before_group[runs[r].group + 1] = static_cast<int64_t>(pieces.size());
  }
  for (int64_t g = 0; g < blocks.groups; ++g) {
    pieces_before_group[g + 1] = std::max(pieces_before_group[g + 1], pieces_before_group[g]);
  }
  const int64_t items = blocks.outer * static_cast<int64_t>(pieces.size());
  if (items == 0) return;
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements / items));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    int64_t item = begin;
    for (int64_t g = 0; g < blocks.groups && item < end; ++g) {
      const int64_t first = pieces_before_group[g], count = pieces_before_group[g + 1] - first;
      const int64_t items_before = blocks.outer * first;
      if (item >= items_before + blocks.outer * count) continue;
      int64_t o = (item - items_before) / count, p = (item - items_before) % count;
      for (; o < blocks.outer && item < end; ++o, p = 0) {
        const int64_t base = (g * blocks.outer + o) * blocks.per_group * blocks.inner;
        for (; p < count && item < end; ++p, ++item) {
          const Piece& piece = pieces[first + p];
          const Run& run = runs[piece.run];
          f(run, o, piece.begin, base + run.first * blocks.inner + piece.begin, piece.count);
        }
      }
    }
  });
}

}  // namespace neq
