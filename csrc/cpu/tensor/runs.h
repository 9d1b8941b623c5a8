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
// What a call costs beside its elements, in elements.
constexpr int64_t kPieceOverhead = 32;

// The memory that runs of one or several tensors own, cut into pieces that are visited in parallel,
// with equal work for every thread however the tensors differ in size.
class Pieces {
 public:
  // `runs` are by group. The n-th call adds part n; runs are numbered through all parts.
  void add(const Blocks& blocks, const std::vector<Run>& runs);

  // Calls f(part, run, outer index, offset inside the run's elements, offset in memory, count) for
  // every piece, each exactly once.
  template <class F>
  void visit(const F& f) const {
    torch::stable::parallel_for(0, cost_, kElementsPerThread,
                                [&](int64_t begin, int64_t end) { visit_range(begin, end, f); });
  }

 private:
  struct Piece {
    int64_t run, begin, offset, count, cost_before;
  };
  // All rows of one group of one part: its outer index counts them, each has the same pieces.
  struct Band {
    int64_t part, first_piece, n_pieces, rows, row_cost, row_stride, offset, cost_before;
  };

  // The pieces whose cost begins in [begin, end).
  template <class F>
  void visit_range(int64_t begin, int64_t end, const F& f) const {
    auto band = std::upper_bound(bands_.begin(), bands_.end(), begin,
                                 [](int64_t cost, const Band& b) { return cost < b.cost_before; }) -
                1;
    int64_t row = (begin - band->cost_before) / band->row_cost;
    const Piece* pieces = pieces_.data() + band->first_piece;
    const int64_t cost_in_row = begin - band->cost_before - row * band->row_cost;
    int64_t i =
        std::lower_bound(pieces, pieces + band->n_pieces, cost_in_row,
                         [](const Piece& p, int64_t cost) { return p.cost_before < cost; }) -
        pieces;
    for (; band != bands_.end(); ++band, row = 0) {
      pieces = pieces_.data() + band->first_piece;
      for (; row < band->rows; ++row, i = 0) {
        const int64_t cost_before = band->cost_before + row * band->row_cost;
        const int64_t row_offset = band->offset + row * band->row_stride;
        for (; i < band->n_pieces; ++i) {
          const Piece& piece = pieces[i];
          if (cost_before + piece.cost_before >= end) return;
          f(band->part, piece.run, row, piece.begin, row_offset + piece.offset, piece.count);
        }
      }
    }
  }

  std::vector<Piece> pieces_;
  std::vector<Band> bands_;
  int64_t parts_ = 0, runs_ = 0, cost_ = 0;
};

// Calls f(run, outer index, offset inside the run's elements, offset in memory, count) for every
// stretch of memory that the runs own, each exactly once, in parallel.
template <class F>
void for_each_piece(const Blocks& blocks, const std::vector<Run>& runs, const F& f) {
  Pieces pieces;
  pieces.add(blocks, runs);
  pieces.visit([&](int64_t, int64_t run, int64_t o, int64_t begin, int64_t at, int64_t count) {
    f(runs[run], o, begin, at, count);
  });
}

}  // namespace neq
