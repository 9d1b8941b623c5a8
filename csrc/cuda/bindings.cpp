// Registration of the private leaf ops for GPU tensors on PyTorch's stable ABI. Python
// (neq_kernels/ops.py) defines the public ops; nothing here is part of the public interface.
#include <torch/csrc/stable/library.h>

#include "device.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(neq_kernels_cuda, m) {
  m.def("multiprocessors() -> int");
  m.def(
      "pack(Tensor rows, Tensor order, Tensor count, int most, bool transposed, bool summed) "
      "-> (Tensor, Tensor)");
  m.def("scatter_rows(Tensor rows, Tensor like, Tensor order, Tensor count) -> Tensor");
  m.def(
      "linear_wgrad(Tensor grad_output, Tensor input, Tensor weight, Tensor order, Tensor count, "
      "int most, bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "conv_wgrad(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation, Tensor order, Tensor count, int most, bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "depthwise_wgrad(Tensor grad_output, Tensor input, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, Tensor order, Tensor count, int most, bool want_bias) "
      "-> (Tensor, Tensor)");
  m.def(
      "sgd_rows_(Tensor first, Tensor addresses, Tensor shapes, int parameters, int blocks, "
      "float lr, float momentum, float dampening, float weight_decay, bool with_momentum, "
      "bool nesterov, bool maximize) -> ()");
  m.def(
      "adam_rows_(Tensor first, Tensor addresses, Tensor shapes, int parameters, int blocks, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool amsgrad, "
      "bool decoupled, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(neq_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("multiprocessors", TORCH_BOX(&neq::cuda::multiprocessors));
}

STABLE_TORCH_LIBRARY_IMPL(neq_kernels_cuda, NEQ_CUDA_KEY, m) {
  m.impl("pack", TORCH_BOX(&neq::cuda::pack));
  m.impl("scatter_rows", TORCH_BOX(&neq::cuda::scatter_rows));
  m.impl("linear_wgrad", TORCH_BOX(&neq::cuda::linear_wgrad));
  m.impl("conv_wgrad", TORCH_BOX(&neq::cuda::conv_wgrad));
  m.impl("depthwise_wgrad", TORCH_BOX(&neq::cuda::depthwise_wgrad));
  m.impl("sgd_rows_", TORCH_BOX(&neq::cuda::sgd_rows_));
  m.impl("adam_rows_", TORCH_BOX(&neq::cuda::adam_rows_));
}
