// The backward of a linear layer and of a convolution in one call: input gradient by PyTorch,
// weight and bias gradients of the active channels by the strategy that was chosen.
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>

#include "conv/direct_wgrad.h"
#include "ops.h"
#include "simd/kernels.h"
#include "tensor/runs.h"
#include "tensor/strides.h"

namespace neq {
namespace {

using torch::stable::narrow;

// As in neq_kernels/backends/problem.py.
enum class Strategy : int64_t { dense, pack, custom };

// BLAS works on this many rows at a time. What is left over, on any of its threads, it sums one
// product after the other, with up to 30 times the error of the rest (float32, 100,000 products).
constexpr int64_t kRowsAtATime = 4;

int64_t rounded_up(int64_t n, int64_t k) {
  return std::min(k, (n + kRowsAtATime - 1) / kRowsAtATime * kRowsAtATime);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor column_sums(const Tensor& t) {
  const int64_t dim = 0;
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
}

Tensor matrix(const Tensor& t) {
  if (t.dim() == 2) return t;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return torch::stable::reshape(t, {rows, t.size(-1)});
}

struct Geometry {
  const std::vector<int64_t>&stride, &padding, &dilation, &output_padding;
  bool transposed;
  int64_t groups;
};

struct OutputMask {
  bool input, weight, bias;
};

// By PyTorch; what was not requested is undefined.
Grads convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                           const Geometry& g, const OutputMask& output_mask) {
  using torch::stable::detail::from;
  std::optional<std::vector<int64_t>> bias_sizes;
  if (output_mask.bias) bias_sizes = {grad.size(1)};
  const bool mask[] = {output_mask.input, output_mask.weight, output_mask.bias};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(input),
                                     from(weight),
                                     from(bias_sizes),
                                     from(g.stride),
                                     from(g.padding),
                                     from(g.dilation),
                                     from(g.transposed),
                                     from(g.output_padding),
                                     from(g.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 3> grads;
  for (size_t i = 0; i < 3; ++i) {
    // oneDNN computes weight and bias together, and may return one that was not requested.
    Tensor computed = torch::stable::detail::to<Tensor>(stack[i]);
    if (mask[i]) grads[i] = computed;
  }
  return {grads[0], grads[1], grads[2]};
}

// Neurons of a weight: rows of dimension `axis`, where `outer` blocks lie before it.
struct Neurons {
  int64_t axis, count;

  int64_t outer(const Tensor& weight) const {
    if (axis == 0) return 1;
    return weight.size(0) * (inner(weight) == 1 ? weight.numel() / weight.size(0) / count : 1);
  }
  int64_t inner(const Tensor& weight) const {
    if (axis == 0) return count == 0 ? 0 : weight.numel() / count;
    return weight.stride(axis) == 1 ? 1 : weight.numel() / weight.size(0) / count;
  }
};

// Neurons order[n:] of a gradient that was computed densely become 0, in place.
void clear_frozen(const Tensor& grad, const Tensor& order, int64_t n, const Neurons& neurons) {
  if (!grad.defined() || grad.numel() == 0) return;
  const bool vector = grad.dim() == 1;
  const Blocks blocks = checked_blocks(grad, "grad", 1, vector ? 1 : neurons.outer(grad),
                                       neurons.count, vector ? 1 : neurons.inner(grad));
  const auto bytes = static_cast<int64_t>(grad.element_size());
  char* data = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t* frozen = checked_order(order, neurons.count, neurons.count);
  for_each_piece(blocks, find_runs(frozen, n, neurons.count, neurons.count, nullptr, neurons.count),
                 bytes, [&](const Run&, int64_t, int64_t, int64_t at, int64_t count) {
                   std::memset(data + at * bytes, 0, static_cast<size_t>(count * bytes));
                 });
}

// The gradients to fill: as the weight lies, and one entry for each neuron.
struct Wholes {
  const Tensor& weight;
  int64_t k;
  ScalarType dtype;

  Tensor of_weight() const { return empty_of_dtype(weight, dtype); }
  Tensor of_bias() const { return empty_in_order({k}, {0}, dtype); }

  Grads zeros(bool want_weight, bool want_bias) const {
    Tensor rows, bias;
    if (want_weight) rows = torch::stable::zero_(rows = of_weight());
    if (want_bias) bias = torch::stable::zero_(bias = of_bias());
    return {Tensor(), rows, bias};
  }
};

// Rows of active neurons, in a gradient whose other rows are zeros; nothing for nothing.
Tensor scattered(const Tensor& rows, const Wholes& wholes, const Tensor& order, int64_t n,
                 const Neurons& neurons) {
  if (!rows.defined()) return rows;
  const bool vector = rows.dim() == 1;
  Tensor whole = vector ? wholes.of_bias() : wholes.of_weight();
  scatter_rows_into(whole, rows, order, n, 1, vector ? 1 : neurons.outer(whole), neurons.count,
                    vector ? 1 : neurons.inner(whole));
  return whole;
}

// A gradient that was computed densely, with zeros over frozen neurons and of the right dtype.
Tensor cleared(const Tensor& grad, const Wholes& wholes, const Tensor& order, int64_t n,
               const Neurons& neurons) {
  if (!grad.defined()) return grad;
  if (grad.scalar_type() == wholes.dtype) {
    if (n < neurons.count) clear_frozen(grad, order, n, neurons);
    return grad;
  }
  const bool vector = grad.dim() == 1;
  Tensor whole = vector ? wholes.of_bias() : wholes.of_weight();
  keep_active_into(whole, grad, order, n, vector ? 1 : neurons.outer(whole), neurons.count,
                   vector ? 1 : neurons.inner(whole));
  return whole;
}

template <class T>
Tensor whole_bias(const std::vector<double>& active, ScalarType dtype, const int64_t* order,
                  int64_t n, int64_t k) {
  if (active.empty()) return Tensor();
  Tensor grad = empty_in_order({k}, {0}, dtype);
  T* to = static_cast<T*>(grad.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) to[order[i]] = static_cast<T>(active[i]);
  for (int64_t i = n; i < k; ++i) to[order[i]] = T(0);
  return grad;
}

// Calls f with zeros of the operands' type and of the gradient's.
template <class F>
void dispatch_operands_and_gradient(ScalarType operands, ScalarType gradient, F&& f) {
  const bool same = gradient == operands;
  require(same || gradient == ScalarType::Float, "weight: expected dtype ",
          torch::headeronly::toString(operands), " or a gradient in Float, got ",
          torch::headeronly::toString(gradient));
  switch (operands) {
    case ScalarType::Double:
      require(same, "in_float: expected 0 for operands of dtype Double");
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return same ? f(BFloat16{}, BFloat16{}) : f(BFloat16{}, float{});
    case ScalarType::Half:
      return same ? f(Half{}, Half{}) : f(Half{}, float{});
    default:
      require(false, "input: expected a floating dtype of at most 64 bits, got ",
              torch::headeronly::toString(operands));
  }
}

// Dimension 0 of `weight` is the outermost in memory.
Grads direct(ConvProblem p, const Tensor& grad, const Tensor& input, const Wholes& wholes,
             const Tensor& order, bool channels_last) {
  p.active = checked_order(order, p.output_channels, p.output_channels);
  Tensor rows = wholes.of_weight(), bias;
  const bool taps_inside = wholes.weight.stride(1) != 1;
  const auto compute = [&](auto operand, auto gradient) {
    using T = decltype(operand);
    using G = decltype(gradient);
    const std::vector<double> active =
        direct_wgrad(p, static_cast<const T*>(grad.const_data_ptr()),
                     static_cast<const T*>(input.const_data_ptr()), channels_last,
                     static_cast<G*>(rows.mutable_data_ptr()), taps_inside);
    bias = whole_bias<G>(active, wholes.dtype, p.active, p.n, p.output_channels);
  };
  dispatch_operands_and_gradient(input.scalar_type(), wholes.dtype, compute);
  return {Tensor(), rows, bias};
}

bool is_channels_last(const Tensor& t) {
  return !is_dense(t, {0, 1, 2, 3}) && is_dense(t, {0, 2, 3, 1});
}

const int64_t* checked_numbers(const Tensor& numbers, int64_t count) {
  require_cpu(numbers, "numbers");
  require(numbers.scalar_type() == ScalarType::Long && numbers.is_contiguous() &&
              numbers.numel() == count,
          "numbers: expected ", count, " of dtype Long, got shape ", shape(numbers));
  return numbers.const_data_ptr<int64_t>();
}

ScalarType dtype_of_gradients(const Tensor& weight, int64_t in_float) {
  return in_float ? ScalarType::Float : weight.scalar_type();
}

Strategy checked_strategy(int64_t strategy) {
  require(0 <= strategy && strategy <= 2, "strategy: expected 0 to 2, got ", strategy);
  return static_cast<Strategy>(strategy);
}

// Of weight and bias alone.
Grads linear_wgrad(const Tensor& dy, const Tensor& input, const Tensor& weight, const Tensor& order,
                   Strategy chosen, int64_t n, int64_t start, ScalarType dtype, bool want_weight,
                   bool want_bias) {
  const int64_t k = weight.size(0), c = weight.size(1);
  const Wholes wholes{weight, k, dtype};
  const Neurons neurons{0, k};
  require(0 <= n && n <= k, "n: expected 0 <= n <= ", k, ", got ", n);
  if (n == 0) return wholes.zeros(want_weight, want_bias);
  if (chosen == Strategy::custom && want_weight && c > 0) {
    const Tensor x = in_order(matrix(input), {0, 1}), grad = in_order(dy, {0, 1});
    require_same_dtype(grad, x, "grad_output");
    require(x.size(0) == grad.size(0) && x.size(1) == c && grad.size(1) == k,
            "input: expected shape (", grad.size(0), ", ", c, "), got ", shape(x));
    const int64_t pixels = x.size(0);
    const ConvProblem p{1,
                        c,
                        k,
                        {pixels, pixels, 1, 1, 0, 1},
                        {1, 1, 1, 1, 0, 1},
                        checked_order(order, n, k),
                        n,
                        want_bias};
    return direct(p, grad, x, wholes, order, true);
  }
  Tensor packed = dy;
  int64_t skipped = 0, m = k;
  if (n < k && chosen != Strategy::dense) {
    m = rounded_up(n, k);
    if (start >= 0) {
      const int64_t first = std::min(start, k - m);
      packed = narrow(packed, 1, first, m);
      skipped = start - first;
    } else if (m < k) {
      packed = pack(dy, order, m, 1);
    }
  }
  Tensor rows, bias;
  if (want_weight) rows = mm(torch::stable::transpose(packed, 0, 1), matrix(input));
  if (want_bias) bias = column_sums(packed);
  if (m == k) {
    return {Tensor(), cleared(rows, wholes, order, n, neurons),
            cleared(bias, wholes, order, n, neurons)};
  }
  if (rows.defined()) rows = narrow(rows, 0, skipped, n);
  if (bias.defined()) bias = narrow(bias, 0, skipped, n);
  return {Tensor(), scattered(rows, wholes, order, n, neurons),
          scattered(bias, wholes, order, n, neurons)};
}

// Of weight and bias alone, by another strategy than the dense one.
Grads conv_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                 const Tensor& order, const Geometry& g, Strategy chosen, int64_t n,
                 ScalarType dtype, bool want_weight, bool want_bias) {
  const int64_t k = grad_output.size(1);
  const Wholes wholes{weight, k, dtype};
  const Neurons neurons{g.transposed ? 1 : 0, k};
  if (n == 0) return wholes.zeros(want_weight, want_bias);
  if (chosen == Strategy::pack || !want_weight) {
    require(g.groups == 1, "groups: expected 1 for the pack strategy, got ", g.groups);
    const int64_t m = rounded_up(n, k);
    const Tensor packed = pack(grad_output, order, m, 1);
    Tensor same = weight;
    const Tensor shape_only = narrow(same, neurons.axis, 0, m);
    auto [none, rows, bias] =
        convolution_backward(packed, input, shape_only, g, {false, want_weight, want_bias});
    if (m > n && rows.defined()) rows = narrow(rows, neurons.axis, 0, n);
    if (m > n && bias.defined()) bias = narrow(bias, 0, 0, n);
    return {Tensor(), scattered(rows, wholes, order, n, neurons),
            scattered(bias, wholes, order, n, neurons)};
  }
  require(!g.transposed, "transposed: expected False for this strategy");
  const ConvProblem p = checked_problem(
      grad_output, input, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
      g.stride, g.padding, g.dilation, order, n, want_bias);
  if (g.groups == 1) {
    const bool last = is_channels_last(input);
    const std::vector<int64_t> dims =
        last ? std::vector<int64_t>{0, 2, 3, 1} : std::vector<int64_t>{0, 1, 2, 3};
    // Channels of a single pixel lie innermost whatever the format.
    const bool single = p.h.input * p.w.input == 1 && p.h.output * p.w.output == 1;
    return direct(p, in_order(grad_output, dims), in_order(input, dims), wholes, order,
                  last || single);
  }
  auto [rows, bias] =
      depthwise_wgrad(grad_output, input, {k, weight.size(1), weight.size(2), weight.size(3)},
                      g.stride, g.padding, g.dilation, order, n, want_bias);
  return {Tensor(), scattered(rows, wholes, order, n, neurons),
          want_bias ? scattered(bias, wholes, order, n, neurons) : Tensor()};
}

}  // namespace

Grads linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                      const Tensor& order, const Tensor& numbers, bool want_input, bool want_weight,
                      bool want_bias) {
  const int64_t* given = checked_numbers(numbers, 4);
  const Tensor dy = matrix(grad_output);
  Tensor grad_input;
  if (want_input) {
    grad_input = mm(dy, weight);
    if (grad_output.dim() != 2) {
      std::vector<int64_t> size = sizes_of(grad_output);
      size.back() = weight.size(1);
      grad_input = torch::stable::reshape(grad_input, size);
    }
  }
  Grads grads;
  if (want_weight || want_bias) {
    grads = linear_wgrad(dy, input, weight, order, checked_strategy(given[0]), given[1], given[2],
                         dtype_of_gradients(weight, given[3]), want_weight, want_bias);
  }
  std::get<0>(grads) = grad_input;
  return grads;
}

Grads conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                    const Tensor& order, const Tensor& numbers, bool want_input, bool want_weight,
                    bool want_bias) {
  const int64_t spatial = weight.dim() - 2;
  const int64_t* given = checked_numbers(numbers, 5 + 4 * spatial);
  const int64_t n = given[1], groups = given[3];
  const bool transposed = given[4] != 0;
  const ScalarType dtype = dtype_of_gradients(weight, given[2]);
  const auto of_each_dimension = [&](int64_t which) {
    const int64_t* first = given + 5 + which * spatial;
    return std::vector<int64_t>(first, first + spatial);
  };
  const std::vector<int64_t> stride = of_each_dimension(0), padding = of_each_dimension(1);
  const std::vector<int64_t> dilation = of_each_dimension(2), output_padding = of_each_dimension(3);
  const Geometry geometry{stride, padding, dilation, output_padding, transposed, groups};
  const int64_t k = grad_output.size(1);
  const Neurons neurons{transposed ? 1 : 0, k};
  const Strategy chosen = checked_strategy(given[0]);
  require(0 <= n && n <= k, "n: expected 0 <= n <= ", k, ", got ", n);
  const bool wants_rows = want_weight || want_bias;
  const bool packs_all = chosen == Strategy::pack && rounded_up(n, k) == k;
  if ((chosen == Strategy::dense || packs_all) && n > 0 && wants_rows) {
    const auto [dx, dw, db] = convolution_backward(grad_output, input, weight, geometry,
                                                   {want_input, want_weight, want_bias});
    const Wholes wholes{weight, k, dtype};
    return {dx, cleared(dw, wholes, order, n, neurons), cleared(db, wholes, order, n, neurons)};
  }
  Tensor grad_input;
  if (want_input) {
    grad_input = std::get<0>(
        convolution_backward(grad_output, input, weight, geometry, {true, false, false}));
  }
  Grads grads;
  if (wants_rows) {
    grads = conv_wgrad(grad_output, input, weight, order, geometry, chosen, n, dtype, want_weight,
                       want_bias);
  }
  std::get<0>(grads) = grad_input;
  return grads;
}

}  // namespace neq
