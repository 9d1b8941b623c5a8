#include "runs.h"

#include "strides.h"

namespace neq {

Blocks checked_blocks(const Tensor& tensor, const char* name, int64_t groups, int64_t outer,
                      int64_t per_group, int64_t inner) {
  const Blocks blocks{groups, outer, per_group, inner};
  require(
      groups > 0 && outer >= 0 && per_group >= 0 && inner >= 0 && blocks.numel() == tensor.numel(),
      name, ": expected blocks of ", tensor.numel(), " elements, got (", groups, ", ", outer, ", ",
      per_group, ", ", inner, ")");
  require_cpu(tensor, name);
  require(tensor.is_contiguous() || is_dense(tensor, memory_order(tensor)), name,
          ": expected a dense tensor");
  return blocks;
}

std::vector<Run> find_runs(const int64_t* order, int64_t begin, int64_t end, int64_t per_group,
                           const int64_t* labels, int64_t max_length) {
  std::vector<Run> runs;
  bool by_group = true;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t neuron = order[slot], group = neuron / per_group;
    if (!runs.empty()) {
      Run& last = runs.back();
      const int64_t previous = order[slot - 1];
      if (neuron == previous + 1 && group == last.group && last.length < max_length &&
          (labels == nullptr || labels[neuron] == labels[previous])) {
        ++last.length;
        continue;
      }
      by_group = by_group && last.group <= group;
    }
    runs.push_back({group, neuron % per_group, 1, slot});
  }
  if (!by_group) {
    std::stable_sort(runs.begin(), runs.end(),
                     [](const Run& a, const Run& b) { return a.group < b.group; });
  }
  return runs;
}

void Pieces::add(const Blocks& blocks, const std::vector<Run>& runs) {
  pieces_.reserve(pieces_.size() + runs.size());
  const int64_t row_stride = blocks.per_group * blocks.inner;
  for (size_t r = 0; r < runs.size();) {
    const int64_t group = runs[r].group, first_piece = static_cast<int64_t>(pieces_.size());
    int64_t row_cost = 0;
    for (; r < runs.size() && runs[r].group == group; ++r) {
      const int64_t elements = runs[r].length * blocks.inner;
      for (int64_t begin = 0; begin < elements; begin += kPieceElements) {
        const int64_t count = std::min(kPieceElements, elements - begin);
        pieces_.push_back({runs_ + static_cast<int64_t>(r), begin,
                           runs[r].first * blocks.inner + begin, count, row_cost});
        row_cost += count + kPieceOverhead;
      }
    }
    const int64_t n_pieces = static_cast<int64_t>(pieces_.size()) - first_piece;
    if (n_pieces == 0 || blocks.outer == 0) continue;
    bands_.push_back({parts_, first_piece, n_pieces, blocks.outer, row_cost, row_stride,
                      group * blocks.outer * row_stride, cost_});
    cost_ += blocks.outer * row_cost;
  }
  ++parts_;
  runs_ += static_cast<int64_t>(runs.size());
}

}  // namespace neq
