// Registration of the private leaf ops on PyTorch's stable ABI. Python (neq_kernels/ops.py) defines
// the public ops; nothing here is part of the public interface.
#include "ops.h"

STABLE_TORCH_LIBRARY(neq_kernels_cpu, m) {
  m.def("capability() -> str");
  m.def("pack(Tensor tensor, Tensor order, int n, int dim) -> Tensor");
  m.def(
      "scatter_rows(Tensor rows, Tensor like, Tensor order, int n, int groups, int outer, "
      "int per_group, int inner) -> Tensor");
  m.def(
      "depthwise_wgrad(Tensor grad_output, Tensor input, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, Tensor order, int n, bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "wgrad_shares(int[] input_size, int[] weight_size, int[] stride, int[] padding, "
      "int[] dilation, bool channels_last, bool half, Tensor order, int n, int threads) -> Tensor");
  m.def("neuron_shares(Tensor order, int n, int[] blocks, int item_bytes, int threads) -> Tensor");
  m.def(
      "pack_shares(Tensor order, int rows, int elements, int item_bytes, bool cut_rows, "
      "int threads) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor order, "
      "Tensor numbers, bool want_input, bool want_weight, bool want_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor order, "
      "Tensor numbers, bool want_input, bool want_weight, bool want_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "sgd_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] steps, Tensor[] orders, int[] n, int[] blocks, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
  m.def(
      "adam_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, "
      "Tensor[] orders, int[] n, int[] blocks, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(neq_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&neq::capability));
}

STABLE_TORCH_LIBRARY_IMPL(neq_kernels_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&neq::pack));
  m.impl("scatter_rows", TORCH_BOX(&neq::scatter_rows));
  m.impl("depthwise_wgrad", TORCH_BOX(&neq::depthwise_wgrad));
  m.impl("wgrad_shares", TORCH_BOX(&neq::wgrad_shares));
  m.impl("neuron_shares", TORCH_BOX(&neq::neuron_shares));
  m.impl("pack_shares", TORCH_BOX(&neq::pack_shares));
  m.impl("linear_backward", TORCH_BOX(&neq::linear_backward));
  m.impl("conv_backward", TORCH_BOX(&neq::conv_backward));
  m.impl("sgd_rows_", TORCH_BOX(&neq::sgd_rows_));
  m.impl("adam_rows_", TORCH_BOX(&neq::adam_rows_));
}
