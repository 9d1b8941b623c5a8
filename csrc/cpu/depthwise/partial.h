// The sums of the parts of a depthwise wgrad, of every active channel: per tap, and last the bias.
#pragma once

#include <algorithm>
#include <vector>

#include "../conv/convolution.h"
#include "../tensor/scratch.h"
#include "../tensor/shares.h"

namespace neq::depthwise {

class Partial {
 public:
  explicit Partial(const ConvProblem& p)
      : n_(p.n), cells_(p.cells()), row_(whole_lines(cells_, sizeof(double))) {}

  void resize(int64_t parts) {
    static thread_local Scratch<double> scratch;
    parts_ = parts;
    sums_ = scratch.at_least(parts * n_ * row_);
  }

  // All 0. Rows are whole lines: channels are several threads'.
  double* fresh_row(int64_t part, int64_t slot) {
    return std::fill_n(sums_ + place(part, slot), cells_, 0.0) - cells_;
  }
  int64_t place(int64_t part, int64_t slot) const { return (part * n_ + slot) * row_; }

  // [n][taps + 1]
  std::vector<double> total() const {
    std::vector<double> total(n_ * cells_, 0.0);
    for (int64_t part = 0; part < parts_; ++part) {
      for (int64_t i = 0; i < n_; ++i) {
        const double* from = sums_ + place(part, i);
        for (int64_t cell = 0; cell < cells_; ++cell) total[i * cells_ + cell] += from[cell];
      }
    }
    return total;
  }

 private:
  int64_t n_, cells_, row_, parts_ = 0;
  double* sums_ = nullptr;
};

}  // namespace neq::depthwise
