// Gather the active channels of a tensor; write rows back into a whole gradient.
#include <algorithm>
#include <cstring>

#include "conv/column_gather.h"
#include "ops.h"
#include "tensor/memory_shares.h"
#include "tensor/runs.h"
#include "tensor/strides.h"
#include "tensor/zeros.h"

namespace neq {
namespace {

// inner == 1: channels lie side by side and each row of `channels` gives a row of n.
template <class Word>
void gather_columns(const void* source, void* target, const int64_t* order, int64_t n,
                    const ChannelView& view) {
  const ColumnGatherPlan plan(order, n, view.channels, sizeof(Word));
  const GatherColumns<Word> gather = gather_columns_kernel<Word>();
  const MemoryShares shares(view.outer, n, sizeof(Word), false, torch::stable::get_num_threads());
  for_each_share(shares.shares(), [&](int64_t i) {
    const Range share = shares.share(i);
    gather(plan.get(0, 0, far_ahead<Word>(view.channels)),
           static_cast<const Word*>(source) + share.begin / n * view.channels, view.channels,
           static_cast<Word*>(target) + share.begin, n, share.size() / n);
  });
}

// Neighbours of order[:n], in its order.
std::vector<Run> slot_runs(const int64_t* order, int64_t n) {
  std::vector<Run> runs;
  for (int64_t slot = 0; slot < n; ++slot) {
    if (slot > 0 && order[slot] == order[slot - 1] + 1) {
      ++runs.back().length;
    } else {
      runs.push_back({0, order[slot], 1, slot});
    }
  }
  return runs;
}

// Each row of the target is made of the runs, one after the other.
void gather_runs(const char* source, char* target, const ChannelView& view, int64_t item_bytes,
                 const std::vector<Run>& runs, int64_t n) {
  const int64_t row = n * view.inner;
  const MemoryShares shares(view.outer, row, item_bytes, true, torch::stable::get_num_threads());
  for_each_share(shares.shares(), [&](int64_t i) {
    const Range share = shares.share(i);
    for (int64_t o = share.begin / row; o * row < share.end; ++o) {
      const int64_t begin = std::max(share.begin - o * row, int64_t{0});
      const int64_t end = std::min(share.end - o * row, row);
      auto run = std::upper_bound(runs.begin(), runs.end(), begin / view.inner,
                                  [](int64_t slot, const Run& r) { return slot < r.slot; }) -
                 1;
      for (int64_t at = begin; at < end; ++run) {
        const int64_t first = run->slot * view.inner, last = first + run->length * view.inner;
        const int64_t count = std::min(end, last) - at;
        const int64_t from = (o * view.channels + run->first) * view.inner + at - first;
        std::memcpy(target + (o * row + at) * item_bytes, source + from * item_bytes,
                    static_cast<size_t>(count * item_bytes));
        at += count;
      }
    }
  });
}

template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<To, double> || std::is_same_v<From, double>) {
      to[i] = static_cast<To>(static_cast<double>(from[i]));
    } else {
      to[i] = static_cast<To>(static_cast<float>(from[i]));
    }
  }
}

// Active neurons all[:n] from where they lie in `source`, in another dtype where the target has
// one; zeros for the others.
template <class From>
void write_neurons(const Tensor& target, const Tensor& source, const Blocks& blocks,
                   const int64_t* all, int64_t n, int64_t max_run, const From& from_where) {
  dispatch_floating(target.scalar_type(), "like", [&](auto to_zero) {
    using To = decltype(to_zero);
    To* to = static_cast<To*>(target.mutable_data_ptr());
    constexpr auto bytes = static_cast<int64_t>(sizeof(To));
    dispatch_floating(source.scalar_type(), "rows", [&](auto from_zero) {
      using Element = decltype(from_zero);
      const Element* from = static_cast<const Element*>(source.const_data_ptr());
      for_each_piece(blocks, find_runs(all, 0, n, blocks.per_group, nullptr, max_run), bytes,
                     [&](const Run& run, int64_t o, int64_t begin, int64_t at, int64_t count) {
                       const Element* row = from + from_where(run, o, begin, at);
                       if constexpr (std::is_same_v<To, Element>) {
                         std::memcpy(to + at, row, static_cast<size_t>(count) * sizeof(To));
                       } else {
                         convert(to + at, row, count);
                       }
                     });
    });
    for_each_piece(blocks,
                   find_runs(all, n, blocks.neurons(), blocks.per_group, nullptr, blocks.neurons()),
                   bytes, [&](const Run&, int64_t, int64_t, int64_t at, int64_t count) {
                     Zeros(target.numel() * bytes).write(to + at, count * bytes);
                   });
  });
}

void require_permutation(const int64_t* order, int64_t neurons) {
  std::vector<bool> seen(neurons, false);
  for (int64_t i = 0; i < neurons; ++i) {
    require(!seen[order[i]], "order: expected every neuron once, got ", order[i], " twice");
    seen[order[i]] = true;
  }
}

}  // namespace

Tensor pack(const Tensor& tensor, const Tensor& order, int64_t n, int64_t dim) {
  require_cpu(tensor, "tensor");
  dim = checked_dim(tensor, dim);
  const int64_t* channels = checked_order(order, n, tensor.size(dim));
  std::vector<int64_t> dims = memory_order(tensor);
  Tensor source = tensor;
  if (!is_dense(tensor, dims)) {
    source = torch::stable::contiguous(tensor);
    dims = memory_order(source);
  }
  std::vector<int64_t> sizes = sizes_of(source);
  sizes[dim] = n;
  Tensor target = empty_in_order(sizes, dims, source.scalar_type());
  if (target.numel() == 0) return target;

  const ChannelView view = channel_view(source, dims, dim);
  const void* from = source.const_data_ptr();
  void* to = target.mutable_data_ptr();
  const auto item_bytes = static_cast<int64_t>(source.element_size());
  if (view.inner == 1 && item_bytes == 2) {
    gather_columns<uint16_t>(from, to, channels, n, view);
  } else if (view.inner == 1 && item_bytes == 4) {
    gather_columns<uint32_t>(from, to, channels, n, view);
  } else if (view.inner == 1 && item_bytes == 8) {
    gather_columns<uint64_t>(from, to, channels, n, view);
  } else {
    gather_runs(static_cast<const char*>(from), static_cast<char*>(to), view, item_bytes,
                slot_runs(channels, n), n);
  }
  return target;
}

Tensor scatter_rows(const Tensor& rows, const Tensor& like, const Tensor& order, int64_t n,
                    int64_t groups, int64_t outer, int64_t per_group, int64_t inner) {
  checked_blocks(like, "like", groups, outer, per_group, inner);
  Tensor target = torch::stable::empty_like(like);
  scatter_rows_into(target, rows, order, n, groups, outer, per_group, inner);
  return target;
}

void scatter_rows_into(const Tensor& target, const Tensor& rows, const Tensor& order, int64_t n,
                       int64_t groups, int64_t outer, int64_t per_group, int64_t inner) {
  const Blocks blocks = checked_blocks(target, "target", groups, outer, per_group, inner);
  const int64_t neurons = blocks.neurons();
  require_cpu(rows, "rows");
  require(order.numel() == neurons, "order: expected length ", neurons, ", got ", order.numel());
  const int64_t* all = checked_order(order, neurons, neurons);
  require_permutation(all, neurons);
  require(0 <= n && n <= neurons, "n: expected 0 <= n <= ", neurons, ", got ", n);
  require(rows.numel() == n * outer * inner, "rows: expected ", n, " neurons of ", outer * inner,
          " elements, got shape ", shape(rows));

  // Rows come one neuron after the other when there are groups, else with the neurons where like
  // has them.
  const bool neuron_first = groups > 1;
  const std::vector<int64_t> dims = memory_order(target);
  Tensor source = rows;
  if (neuron_first) {
    source = torch::stable::contiguous(rows);
  } else if (n > 0) {
    require(rows.dim() == target.dim(), "rows: expected ", target.dim(), " dimensions, got shape ",
            shape(rows));
    int64_t unlike = 0;
    for (int64_t d = 0; d < target.dim(); ++d) unlike += rows.size(d) != target.size(d);
    require(unlike <= 1, "rows: expected the shape of like, ", shape(target),
            ", but for the number of neurons, got ", shape(rows));
    source = in_order(rows, dims);
  }
  const int64_t slot_stride = neuron_first ? outer * inner : inner;
  const int64_t outer_stride = neuron_first ? inner : n * inner;
  const bool joins = slot_stride == inner;
  const int64_t max_run = joins ? neurons : 1;

  write_neurons(target, source, blocks, all, n, max_run,
                [&](const Run& run, int64_t o, int64_t begin, int64_t at) {
                  return run.slot * slot_stride + o * outer_stride + begin;
                });
}

void keep_active_into(const Tensor& target, const Tensor& whole, const Tensor& order, int64_t n,
                      int64_t outer, int64_t neurons, int64_t inner) {
  const Blocks blocks = checked_blocks(target, "target", 1, outer, neurons, inner);
  require_same_shape(whole, target, "whole");
  const int64_t* all = checked_order(order, neurons, neurons);
  write_neurons(target, in_order(whole, memory_order(target)), blocks, all, n, neurons,
                [](const Run&, int64_t, int64_t, int64_t at) { return at; });
}

}  // namespace neq
