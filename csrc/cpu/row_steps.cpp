// Optimizer steps for the active neurons only.
#include <algorithm>
#include <cmath>
#include <functional>

#include "ops.h"
#include "simd/kernels.h"
#include "tensor/runs.h"

namespace neq {
namespace {

void require_distinct(const int64_t* order, int64_t n, int64_t neurons) {
  // Nearly always: nothing to remember.
  if (std::adjacent_find(order, order + n, std::greater_equal<>()) == order + n) return;
  std::vector<bool> seen(neurons, false);
  for (int64_t i = 0; i < n; ++i) {
    require(!seen[order[i]], "order: expected no duplicates, got ", order[i], " twice");
    seen[order[i]] = true;
  }
}

// Called for every state of every parameter: nothing is put into words unless it is wrong.
int64_t* checked_steps(const Tensor& steps, int64_t neurons) {
  const bool fits = steps.is_cpu() && steps.scalar_type() == ScalarType::Long && steps.dim() == 1 &&
                    steps.numel() == neurons && steps.is_contiguous();
  if (!fits) {
    require_cpu(steps, "steps");
    require(false, "steps: expected a contiguous int64 vector of length ", neurons, ", got shape ",
            shape(steps), " of ", torch::headeronly::toString(steps.scalar_type()));
  }
  return steps.mutable_data_ptr<int64_t>();
}

bool lies_as(const Tensor& tensor, const Tensor& param) {
  if (!tensor.is_cpu() || tensor.scalar_type() != param.scalar_type()) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto param_sizes = param.sizes(), param_strides = param.strides();
  if (sizes.size() != param_sizes.size()) return false;
  bool is_empty = false, same_strides = true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != param_sizes[d]) return false;
    is_empty = is_empty || sizes[d] == 0;
    same_strides = same_strides && (sizes[d] == 1 || strides[d] == param_strides[d]);
  }
  return same_strides || is_empty;
}

// The data of a tensor that lies in memory exactly as `param` does.
template <class T>
T* data_like(const Tensor& tensor, const Tensor& param, const char* name) {
  if (!lies_as(tensor, param)) {
    require_cpu(tensor, name);
    require_same_dtype(tensor, param, name);
    require_same_shape(tensor, param, name);
    require(false, name, ": expected the strides of param");
  }
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void require_rate(double value, const char* name) {
  require(std::isfinite(value), name, ": expected a finite number, got ", value);
}

template <class List>
void require_length(const List& list, size_t length, const char* name) {
  require(list.size() == length, name, ": expected ", length, ", got ", list.size());
}

// The active neurons of some parameters of one dtype.
class ActiveNeurons {
 public:
  ActiveNeurons(const TensorList& params, const TensorList& orders, const IntList& n,
                const IntList& blocks)
      : params_(params) {
    require_length(orders, params.size(), "orders");
    require_length(n, params.size(), "n");
    require_length(blocks, 4 * params.size(), "blocks");
    parts_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      require_same_dtype(params[i], params[0], "param");
      const int64_t* b = &blocks[4 * i];
      const Blocks where = checked_blocks(params[i], "param", b[0], b[1], b[2], b[3]);
      parts_.push_back({where, checked_neurons(i, orders, n, where.neurons()), n[i]});
    }
  }

  // One pointer per parameter; none for an empty list.
  template <class T>
  std::vector<T*> data(const TensorList& tensors, const char* name) const {
    std::vector<T*> pointers(tensors.size());
    if (!tensors.empty()) require_length(tensors, params_.size(), name);
    for (size_t i = 0; i < tensors.size(); ++i) {
      pointers[i] = data_like<T>(tensors[i], params_[i], name);
    }
    return pointers;
  }

  std::vector<int64_t*> step_counts(const TensorList& steps) const {
    std::vector<int64_t*> counts(steps.size());
    if (!steps.empty()) require_length(steps, params_.size(), "steps");
    for (size_t i = 0; i < steps.size(); ++i) {
      counts[i] = checked_steps(steps[i], parts_[i].blocks.neurons());
    }
    return counts;
  }

  // Pieces of neighbours with equal counts, and for each of their runs what `kind` makes of its
  // count.
  template <class Kind>
  std::vector<int32_t> cut(const std::vector<int64_t*>& counts, Pieces& pieces,
                           const Kind& kind) const {
    std::vector<int32_t> kinds;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const auto& [blocks, neurons, n] = parts_[i];
      const int64_t* labels = counts.empty() ? nullptr : counts[i];
      const std::vector<Run> runs = find_runs(neurons, 0, n, blocks.per_group, labels, n);
      for (const Run& run : runs) kinds.push_back(kind(labels ? labels[neurons[run.slot]] : -1));
      pieces.add(blocks, runs);
    }
    return kinds;
  }

  void count_step(const std::vector<int64_t*>& counts) const {
    for (size_t i = 0; i < counts.size(); ++i) {
      for (int64_t k = 0; k < parts_[i].n; ++k) ++counts[i][parts_[i].neurons[k]];
    }
  }

 private:
  struct Part {
    Blocks blocks;
    const int64_t* neurons;
    int64_t n;
  };

  const int64_t* checked_neurons(size_t i, const TensorList& orders, const IntList& n,
                                 int64_t neurons) const {
    // A weight, its bias and often more share one order.
    const bool as_before = i > 0 && n[i] == n[i - 1] && neurons == parts_[i - 1].blocks.neurons() &&
                           orders[i].const_data_ptr() == orders[i - 1].const_data_ptr() &&
                           lies_as(orders[i], orders[i - 1]);
    if (as_before) return parts_[i - 1].neurons;
    const int64_t* order = checked_order(orders[i], n[i], neurons);
    require_distinct(order, n[i], neurons);
    return order;
  }

  const TensorList& params_;
  std::vector<Part> parts_;
};

}  // namespace

void sgd_rows_(const TensorList& params, const TensorList& grads, const TensorList& buffers,
               const TensorList& steps, const TensorList& orders, const IntList& n,
               const IntList& blocks, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize) {
  require(!params.empty(), "params: expected at least one, got none");
  const ActiveNeurons active(params, orders, n, blocks);
  const bool with_momentum = momentum != 0;
  require_length(grads, params.size(), "grads");
  if (with_momentum) require_length(buffers, params.size(), "momentum_buffers");
  require_rate(lr, "lr");
  const std::vector<int64_t*> counts = active.step_counts(steps);

  dispatch_floating(params[0].scalar_type(), "param", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const std::vector<T*> p = active.data<T>(params, "param"), g = active.data<T>(grads, "grad"),
                          b = active.data<T>(buffers, "momentum_buffer");
    Pieces pieces(sizeof(T));
    const std::vector<int32_t> is_first =
        active.cut(with_momentum ? counts : std::vector<int64_t*>(), pieces,
                   [](int64_t count) { return count == 0; });
    const SgdStep<C> step{static_cast<C>(lr),
                          static_cast<C>(momentum),
                          static_cast<C>(1 - dampening),
                          static_cast<C>(weight_decay),
                          static_cast<C>(maximize ? -1 : 1),
                          nesterov};
    const Kernels<T>& k = kernels<T>();
    pieces.visit([&](int64_t i, int64_t run, int64_t, int64_t, int64_t at, int64_t count) {
      if (!with_momentum) return k.sgd(p[i] + at, g[i] + at, count, step);
      (is_first[run] ? k.sgd_first_momentum : k.sgd_momentum)(p[i] + at, g[i] + at, b[i] + at,
                                                              count, step);
    });
  });
  active.count_step(counts);
}

void adam_rows_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                const TensorList& steps, const TensorList& orders, const IntList& n,
                const IntList& blocks, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, bool maximize) {
  require(!params.empty(), "params: expected at least one, got none");
  const ActiveNeurons active(params, orders, n, blocks);
  require_length(grads, params.size(), "grads");
  require_length(exp_avgs, params.size(), "exp_avgs");
  require_length(exp_avg_sqs, params.size(), "exp_avg_sqs");
  require_length(steps, params.size(), "steps");
  require_rate(lr, "lr");
  const std::vector<int64_t*> counts = active.step_counts(steps);

  dispatch_floating(params[0].scalar_type(), "param", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const std::vector<T*> p = active.data<T>(params, "param"), g = active.data<T>(grads, "grad"),
                          m = active.data<T>(exp_avgs, "exp_avg"),
                          v = active.data<T>(exp_avg_sqs, "exp_avg_sq"),
                          v_max = active.data<T>(max_exp_avg_sqs, "max_exp_avg_sq");

    // Neurons that have stepped equally often share one: mostly all of them.
    std::vector<AdamStep<C>> different_steps;
    int64_t last_count = -1;
    Pieces pieces(sizeof(T));
    const std::vector<int32_t> step_of_run = active.cut(counts, pieces, [&](int64_t before) {
      if (different_steps.empty() || before != last_count) {
        const double count = static_cast<double>(before + 1);
        different_steps.push_back(
            {static_cast<C>(lr / (1 - std::pow(beta1, count))), static_cast<C>(1 - beta1),
             static_cast<C>(beta2), static_cast<C>(1 - beta2),
             static_cast<C>(std::sqrt(1 - std::pow(beta2, count))), static_cast<C>(eps),
             static_cast<C>(decoupled ? 0 : weight_decay),
             static_cast<C>(decoupled ? 1 - lr * weight_decay : 1),
             static_cast<C>(maximize ? -1 : 1)});
        last_count = before;
      }
      return static_cast<int32_t>(different_steps.size() - 1);
    });
    const Kernels<T>& k = kernels<T>();
    pieces.visit([&](int64_t i, int64_t run, int64_t, int64_t, int64_t at, int64_t count) {
      const AdamStep<C>& step = different_steps[step_of_run[run]];
      if (v_max.empty()) {
        k.adam(p[i] + at, g[i] + at, m[i] + at, v[i] + at, count, step);
      } else {
        k.adam_amsgrad(p[i] + at, g[i] + at, m[i] + at, v[i] + at, v_max[i] + at, count, step);
      }
    });
  });
  active.count_step(counts);
}

}  // namespace neq
