// The shares of the threads in the parallel loops, for a test: of any number of threads, and
// without the tensors.
#include <cstring>

#include "conv/direct_wgrad.h"
#include "depthwise/depthwise_wgrad.h"
#include "ops.h"
#include "tensor/memory_shares.h"
#include "tensor/runs.h"
#include "tensor/share_table.h"
#include "tensor/strides.h"

namespace neq {
namespace {

Tensor table_of(const ShareTable& shares) {
  const auto count = static_cast<int64_t>(shares.numbers().size());
  Tensor table = empty_in_order({count / ShareTable::kColumns, ShareTable::kColumns}, {0, 1},
                                ScalarType::Long);
  std::memcpy(table.mutable_data_ptr(), shares.numbers().data(), count * sizeof(int64_t));
  return table;
}

Axis axis_of(const IntList& input, const IntList& weight, const IntList& stride,
             const IntList& padding, const IntList& dilation, size_t d) {
  const int64_t reach = input[2 + d] + 2 * padding[d] - dilation[d] * (weight[2 + d] - 1) - 1;
  return {input[2 + d], reach / stride[d] + 1, weight[2 + d], stride[d], padding[d], dilation[d]};
}

}  // namespace

Tensor wgrad_shares(const IntList& input, const IntList& weight, const IntList& stride,
                    const IntList& padding, const IntList& dilation, bool channels_last, bool half,
                    const Tensor& order, int64_t n, int64_t threads) {
  require(input.size() == 4 && weight.size() == 4 && stride.size() == 2 && padding.size() == 2 &&
              dilation.size() == 2,
          "input, weight, stride, padding, dilation: expected 4, 4, 2, 2 and 2 numbers");
  const ConvProblem p{input[0],
                      input[1],
                      weight[0],
                      axis_of(input, weight, stride, padding, dilation, 0),
                      axis_of(input, weight, stride, padding, dilation, 1),
                      checked_order(order, weight[0], weight[0]),
                      n,
                      true};
  ShareTable shares;
  if (weight[1] == 1 && input[1] > 1) {
    depthwise_wgrad_shares(p, channels_last, threads, shares);
  } else {
    direct_wgrad_shares(p, channels_last, !channels_last, half, threads, shares);
  }
  return table_of(shares);
}

Tensor neuron_shares(const Tensor& order, int64_t n, const IntList& blocks, int64_t item_bytes,
                     int64_t threads) {
  require(blocks.size() == 4, "blocks: expected 4 numbers, got ", blocks.size());
  const Blocks where{blocks[0], blocks[1], blocks[2], blocks[3]};
  const int64_t* active = checked_order(order, n, where.neurons());
  Pieces pieces(item_bytes);
  pieces.add(where, find_runs(active, 0, n, where.per_group, nullptr, n));
  ShareTable table;
  const int64_t shares = pieces.shares_for(threads);
  for (int64_t i = 0; i < shares; ++i) {
    pieces.visit_share(i, shares,
                       [&](int64_t, int64_t, int64_t, int64_t, int64_t at, int64_t count) {
                         table.add_work(0, i, count + kPieceOverhead);
                         table.add_writes(0, i, {0, at * item_bytes, count * item_bytes});
                       });
  }
  return table_of(table);
}

Tensor pack_shares(const Tensor& order, int64_t rows, int64_t elements, int64_t item_bytes,
                   bool cut_rows, int64_t threads) {
  require_cpu(order, "order");
  ShareTable table;
  const MemoryShares shares(rows, elements, item_bytes, cut_rows, threads);
  for (int64_t i = 0; i < shares.shares(); ++i) {
    const Range share = shares.share(i);
    table.add_work(0, i, share.size());
    table.add_writes(0, i, {0, share.begin * item_bytes, share.size() * item_bytes});
  }
  return table_of(table);
}

}  // namespace neq
