// The private leaf ops, registered in bindings.cpp under the schemas given there.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensor/checks.h"

namespace neq {

std::string capability();

Tensor pack(const Tensor& tensor, const Tensor& order, int64_t n, int64_t dim);

Tensor scatter_rows(const Tensor& rows, const Tensor& like, const Tensor& order, int64_t n,
                    int64_t groups, int64_t outer, int64_t per_group, int64_t inner);

// The same into a tensor that is there.
void scatter_rows_into(const Tensor& target, const Tensor& rows, const Tensor& order, int64_t n,
                       int64_t groups, int64_t outer, int64_t per_group, int64_t inner);

// Neurons order[:n] of `whole`, in the target's dtype; zeros for the others.
void keep_active_into(const Tensor& target, const Tensor& whole, const Tensor& order, int64_t n,
                      int64_t outer, int64_t neurons, int64_t inner);

std::tuple<Tensor, Tensor> depthwise_wgrad(const Tensor& grad_output, const Tensor& input,
                                           const std::vector<int64_t>& weight_shape,
                                           const std::vector<int64_t>& stride,
                                           const std::vector<int64_t>& padding,
                                           const std::vector<int64_t>& dilation,
                                           const Tensor& order, int64_t n, bool want_bias);

// Gradients of input, weight and bias; undefined where not requested.
using Grads = std::tuple<Tensor, Tensor, Tensor>;

// Numbers come as one tensor, int64 on the CPU: every argument of an operator costs time. With
// in_float the gradients of weight and bias are float32, whatever the operands are.
// strategy, n, start, in_float
Grads linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                      const Tensor& order, const Tensor& numbers, bool want_input, bool want_weight,
                      bool want_bias);

// strategy, n, in_float, groups, transposed, then stride, padding, dilation, output padding by
// dimension
Grads conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                    const Tensor& order, const Tensor& numbers, bool want_input, bool want_weight,
                    bool want_bias);

using TensorList = std::vector<Tensor>;
using IntList = std::vector<int64_t>;

// Which thread does what in the custom wgrad of a shape: the rows of a ShareTable.
Tensor wgrad_shares(const IntList& input_size, const IntList& weight_size, const IntList& stride,
                    const IntList& padding, const IntList& dilation, bool channels_last, bool half,
                    const Tensor& order, int64_t n, int64_t threads);

// Likewise for active neurons of a tensor, and for `rows` rows of `elements` that are packed.
Tensor neuron_shares(const Tensor& order, int64_t n, const IntList& blocks, int64_t item_bytes,
                     int64_t threads);
Tensor pack_shares(const Tensor& order, int64_t rows, int64_t elements, int64_t item_bytes,
                   bool cut_rows, int64_t threads);

// Parameter by parameter; `blocks` has four numbers for each, lists that are not used are empty.

void sgd_rows_(const TensorList& params, const TensorList& grads, const TensorList& buffers,
               const TensorList& steps, const TensorList& orders, const IntList& n,
               const IntList& blocks, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize);

void adam_rows_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                const TensorList& steps, const TensorList& orders, const IntList& n,
                const IntList& blocks, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, bool maximize);

}  // namespace neq
