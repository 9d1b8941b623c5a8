// Neurons of a parameter as runs of neighbours in memory, visited in parallel.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "shares.h"

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

// Runs of order[begin:end], as they lie in memory. Neighbours join when their labels agree
// (labels[neuron]; nullptr: always) and the run stays within max_length.
std::vector<Run> find_runs(const int64_t* order, int64_t begin, int64_t end, int64_t per_group,
                           const int64_t* labels, int64_t max_length);

// Elements handled by one call at most. A call begins at the beginning of its run or at a multiple
// of kCutElements from there, so what is done with an element does not depend on the number of
// threads.
constexpr int64_t kPieceElements = 16384, kCutElements = 2048;
// What a call costs beside its elements, in elements.
constexpr int64_t kPieceOverhead = 32;

// The memory that runs of one or several tensors own, cut into pieces that are visited in parallel,
// with equal work for every thread however the tensors differ in size. Tensors are expected to
// begin where a line does, as PyTorch's do.
class Pieces {
 public:
  explicit Pieces(int64_t item_bytes) : item_bytes_(item_bytes) {}

  // `runs` are as they lie in memory. The n-th call adds part n; runs are numbered through all
  // parts.
  void add(const Blocks& blocks, const std::vector<Run>& runs);

  // Calls f(part, run, outer index, offset inside the run's elements, offset in memory, count) for
  // every piece, each exactly once.
  template <class F>
  void visit(const F& f) const {
    const int64_t shares = shares_for(torch::stable::get_num_threads());
    for_each_share(shares, [&](int64_t share) { visit_share(share, shares, f); });
  }

  // Only those of one share.
  template <class F>
  void visit_share(int64_t share, int64_t shares, const F& f) const {
    if (bands_.empty()) return;
    const Place begin = begin_of(share, shares), end = begin_of(share + 1, shares);
    int64_t row = begin.row, i = begin.piece, from = begin.offset;
    for (int64_t b = begin.band; b < std::min(end.band + 1, n_bands()); ++b, row = 0) {
      const Band& band = bands_[b];
      const Piece* pieces = pieces_.data() + band.first_piece;
      for (; row < (b == end.band ? end.row + 1 : band.rows); ++row, i = 0) {
        const bool is_last = b == end.band && row == end.row;
        const int64_t row_offset = band.offset + row * band.row_stride;
        const auto visit_piece = [&](int64_t to) {
          const Piece& piece = pieces[i];
          f(band.part, piece.run, row, piece.begin + from, row_offset + piece.offset + from,
            to - from);
          from = 0;
        };
        for (; i < (is_last ? end.piece : band.n_pieces); ++i) visit_piece(pieces[i].count);
        if (is_last && end.offset > 0) visit_piece(end.offset);
      }
    }
  }

  int64_t shares_for(int64_t threads) const;

 private:
  struct Piece {
    int64_t run, begin, offset, count, cost_before;
  };
  // All rows of one group of one part: its outer index counts them, each has the same pieces.
  struct Band {
    int64_t part, first_piece, n_pieces, rows, row_cost, row_stride, offset, cost_before;
  };
  // An element of a piece.
  struct Place {
    int64_t band, row, piece, offset;
    bool operator<(const Place& other) const {
      return std::tie(band, row, piece, offset) <
             std::tie(other.band, other.row, other.piece, other.offset);
    }
  };

  int64_t n_bands() const { return static_cast<int64_t>(bands_.size()); }
  Place begin_of(int64_t share, int64_t shares) const;
  Place at_cost(int64_t cost) const;
  Place after(Place place) const;
  bool begins_a_line(const Place& place) const;
  int64_t cost_before(const Place& place) const;
  int64_t byte_of(const Place& place) const;

  int64_t item_bytes_;
  std::vector<Piece> pieces_;
  std::vector<Band> bands_;
  int64_t parts_ = 0, runs_ = 0, cost_ = 0;
};

// Calls f(run, outer index, offset inside the run's elements, offset in memory, count) for every
// stretch of memory that the runs own, each exactly once, in parallel.
template <class F>
void for_each_piece(const Blocks& blocks, const std::vector<Run>& runs, int64_t item_bytes,
                    const F& f) {
  Pieces pieces(item_bytes);
  pieces.add(blocks, runs);
  pieces.visit([&](int64_t, int64_t run, int64_t o, int64_t begin, int64_t at, int64_t count) {
    f(runs[run], o, begin, at, count);
  });
}

}  // namespace neq
