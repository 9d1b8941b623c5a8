#include "convolution.h"

namespace neq {
namespace {

Axis checked_axis(const Tensor& grad, const Tensor& input, const std::vector<int64_t>& weight_shape,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, size_t i) {
  const Axis axis{input.size(2 + i), grad.size(2 + i), weight_shape[2 + i],
                  stride[i],         padding[i],       dilation[i]};
  require(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.padding >= 0,
          "kernel, stride, dilation: expected at least 1, and padding at least 0, got ",
          axis.kernel, ", ", axis.stride, ", ", axis.dilation, " and ", axis.padding);
  const int64_t reach = axis.input + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1;
  const int64_t output = reach < 0 ? 0 : reach / axis.stride + 1;
  require(axis.output == output, "grad_output: expected size ", output, " in dimension ", 2 + i,
          ", got ", axis.output);
  return axis;
}

}  // namespace

ConvProblem checked_problem(const Tensor& grad_output, const Tensor& input,
                            const std::vector<int64_t>& weight_shape,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, const Tensor& order, int64_t n,
                            bool want_bias) {
  require_cpu(grad_output, "grad_output");
  require_cpu(input, "input");
  require_same_dtype(grad_output, input, "grad_output");
  require(grad_output.dim() == 4 && input.dim() == 4 && weight_shape.size() == 4,
          "grad_output, input, weight: expected 4 dimensions, got ", grad_output.dim(), ", ",
          input.dim(), " and ", weight_shape.size());
  require(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
          "stride, padding, dilation: expected 2 values each, got ", stride.size(), ", ",
          padding.size(), " and ", dilation.size());
  require(input.size(1) > 0, "input: expected at least 1 channel, got shape ", shape(input));
  require(weight_shape[0] == grad_output.size(1), "weight: expected ", grad_output.size(1),
          " filters, got ", weight_shape[0]);
  require(grad_output.size(0) == input.size(0), "grad_output: expected batch ", input.size(0),
          ", got ", grad_output.size(0));
  return {input.size(0),
          input.size(1),
          grad_output.size(1),
          checked_axis(grad_output, input, weight_shape, stride, padding, dilation, 0),
          checked_axis(grad_output, input, weight_shape, stride, padding, dilation, 1),
          checked_order(order, n, grad_output.size(1)),
          n,
          want_bias};
}

void flatten_pixels(ConvProblem& p, bool channels_last) {
  for (const Axis* axis : {&p.h, &p.w}) {
    if (axis->kernel != 1 || axis->stride != 1 || axis->padding != 0) return;
  }
  int64_t pixels = p.h.output * p.w.output;
  if (channels_last) {
    pixels *= p.images;
    p.images = 1;
  }
  p.h = {pixels, pixels, 1, 1, 0, 1};
  p.w = {1, 1, 1, 1, 0, 1};
}

}  // namespace neq
