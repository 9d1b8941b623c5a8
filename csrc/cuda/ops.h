// The private leaf ops for GPU tensors, registered in bindings.cpp under the schemas given there:
// they allocate, decide how the work is cut, and launch. neq_kernels/backends/cuda.py gives them
// what they support: rows that start at multiples of 16 bytes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace neq::cuda {

using torch::stable::Tensor;
using IntList = std::vector<int64_t>;
// Of weight and bias; the bias's is undefined where it was not requested.
using Grads = std::tuple<Tensor, Tensor>;

// `rows`, matrix or channels_last images: the active channels side by side, [rows, at least most],
// or transposed, [most, at least rows]; and float sums in parts, [parts, most].
std::tuple<Tensor, Tensor> pack(const Tensor& rows, const Tensor& order, const Tensor& count,
                                int64_t most, bool transposed, bool summed);

// Like `like`: neurons order[:count] hold `rows`, the others are 0. A neuron's elements, a multiple
// of 4, lie one after the other in both.
Tensor scatter_rows(const Tensor& rows, const Tensor& like, const Tensor& order,
                    const Tensor& count);

Grads linear_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const Tensor& order, const Tensor& count, int64_t most, bool want_bias);

// Of channels_last images.
Grads conv_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                 const IntList& stride, const IntList& padding, const IntList& dilation,
                 const Tensor& order, const Tensor& count, int64_t most, bool want_bias);

// Of images with any strides; a channel of the weight is [1, R, S], contiguous.
Grads depthwise_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      const Tensor& order, const Tensor& count, int64_t most, bool want_bias);

// Steps of the active neurons of many parameters of `first`'s dtype and device, found by the tables
// of neq_kernels/backends/gpu_base.py.
void sgd_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
               int64_t parameters, int64_t blocks, double lr, double momentum, double dampening,
               double weight_decay, bool with_momentum, bool nesterov, bool maximize);

void adam_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
                int64_t parameters, int64_t blocks, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool amsgrad, bool decoupled, bool maximize);

}  // namespace neq::cuda
