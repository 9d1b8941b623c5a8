// Optimizer steps for the active neurons only.
#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "runs.h"

namespace neq {
namespace {

void require_distinct(const int64_t* order, int64_t n, int64_t neurons) {
  std::vector<bool> seen(neurons, false);
  for (int64_t i = 0; i < n; ++i) {
    require(!seen[order[i]], "order: expected no duplicates, got ", order[i], " twice");
    seen[order[i]] = true;
  }
}

int64_t* checked_steps(const Tensor& steps, int64_t neurons) {
  require_cpu(steps, "steps");
  require(steps.scalar_type() == ScalarType::Long && steps.dim() == 1 && steps.numel() == neurons &&
              steps.is_contiguous(),
          "steps: expected a contiguous int64 vector of length ", neurons, ", got shape ",
          shape(steps), " of ", torch::headeronly::toString(steps.scalar_type()));
  return steps.mutable_data_ptr<int64_t>();
}

// The data of a tensor that lies in memory exactly as `param` does.
template <class T>
T* data_like(const Tensor& tensor, const Tensor& param, const char* name) {
  require_cpu(tensor, name);
  require_same_dtype(tensor, param, name);
  require_same_shape(tensor, param, name);
  for (int64_t d = 0; d < param.dim(); ++d) {
    require(tensor.size(d) == 1 || tensor.numel() == 0 || tensor.stride(d) == param.stride(d), name,
            ": expected the strides of param");
  }
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void require_rate(double value, const char* name) {
  require(std::isfinite(value), name, ": expected a finite number, got ", value);
}

}  // namespace

void sgd_rows_(const Tensor& param, const Tensor& grad, const std::optional<Tensor>& buffer,
               const std::optional<Tensor>& steps, const Tensor& order, int64_t n, int64_t groups,
               int64_t outer, int64_t per_group, int64_t inner, double lr, double momentum,
               double dampening, double weight_decay, bool nesterov, bool maximize) {
  const Blocks blocks = checked_blocks(param, "param", groups, outer, per_group, inner);
  const int64_t* neurons = checked_order(order, n, blocks.neurons());
  require_distinct(neurons, n, blocks.neurons());
  require(buffer.has_value() || momentum == 0, "momentum_buffer: expected a tensor, got None");
  require_rate(lr, "lr");
  int64_t* step_counts = steps ? checked_steps(*steps, blocks.neurons()) : nullptr;
  const bool with_momentum = momentum != 0;

  std::vector<int64_t> is_first(with_momentum && step_counts ? blocks.neurons() : 0);
  for (size_t k = 0; k < is_first.size(); ++k) is_first[k] = step_counts[k] == 0;
  const std::vector<Run> runs =
      find_runs(neurons, 0, n, per_group, is_first.empty() ? nullptr : is_first.data(), n);

  dispatch_floating(param.scalar_type(), "param", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    T* p = static_cast<T*>(param.mutable_data_ptr());
    const T* g = data_like<T>(grad, param, "grad");
    T* b = with_momentum ? data_like<T>(*buffer, param, "momentum_buffer") : nullptr;
    const SgdStep<C> step{static_cast<C>(lr),
                          static_cast<C>(momentum),
                          static_cast<C>(1 - dampening),
                          static_cast<C>(weight_decay),
                          static_cast<C>(maximize ? -1 : 1),
                          nesterov};
    const Kernels<T>& k = kernels<T>();
    for_each_piece(blocks, runs, [&](const Run& run, int64_t, int64_t, int64_t at, int64_t count) {
      if (!with_momentum) return k.sgd(p + at, g + at, count, step);
      const bool first = !is_first.empty() && is_first[neurons[run.slot]];
      (first ? k.sgd_first_momentum : k.sgd_momentum)(p + at, g + at, b + at, count, step);
    });
  });
  if (step_counts) {
    for (int64_t i = 0; i < n; ++i) ++step_counts[neurons[i]];
  }
}

void adam_rows_(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const std::optional<Tensor>& max_exp_avg_sq,
                const Tensor& steps, const Tensor& order, int64_t n, int64_t groups, int64_t outer,
                int64_t per_group, int64_t inner, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, bool maximize) {
  const Blocks blocks = checked_blocks(param, "param", groups, outer, per_group, inner);
  const int64_t* neurons = checked_order(order, n, blocks.neurons());
  require_distinct(neurons, n, blocks.neurons());
  require_rate(lr, "lr");
  int64_t* step_counts = checked_steps(steps, blocks.neurons());

  dispatch_floating(param.scalar_type(), "param", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    T* p = static_cast<T*>(param.mutable_data_ptr());
    const T* g = data_like<T>(grad, param, "grad");
    T* m = data_like<T>(exp_avg, param, "exp_avg");
    T* v = data_like<T>(exp_avg_sq, param, "exp_avg_sq");
    T* v_max = max_exp_avg_sq ? data_like<T>(*max_exp_avg_sq, param, "max_exp_avg_sq") : nullptr;

    const std::vector<Run> runs = find_runs(neurons, 0, n, per_group, step_counts, n);
    for (int64_t i = 0; i < n; ++i) ++step_counts[neurons[i]];
    // Indexed by slot, filled at the first slot of each run.
    std::vector<AdamStep<C>> step_of_run(n);
    for (const Run& run : runs) {
      const double count = static_cast<double>(step_counts[neurons[run.slot]]);
      step_of_run[run.slot] = {static_cast<C>(lr / (1 - std::pow(beta1, count))),
                               static_cast<C>(1 - beta1),
                               static_cast<C>(beta2),
                               static_cast<C>(1 - beta2),
                               static_cast<C>(std::sqrt(1 - std::pow(beta2, count))),
                               static_cast<C>(eps),
                               static_cast<C>(decoupled ? 0 : weight_decay),
                               static_cast<C>(decoupled ? 1 - lr * weight_decay : 1),
                               static_cast<C>(maximize ? -1 : 1)};
    }
    const Kernels<T>& k = kernels<T>();
    for_each_piece(blocks, runs, [&](const Run& run, int64_t, int64_t, int64_t at, int64_t count) {
      const AdamStep<C>& step = step_of_run[run.slot];
      if (v_max) {
        k.adam_amsgrad(p + at, g + at, m + at, v + at, v_max + at, count, step);
      } else {
        k.adam(p + at, g + at, m + at, v + at, count, step);
      }
    });
  });
}

}  // namespace neq
