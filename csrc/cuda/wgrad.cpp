// Weight gradients, packing in front of PyTorch's products, and its rows put into whole gradients.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "split_k.h"
#include "wgrad/tile_rules.h"

namespace neq::cuda {
namespace {

using torch::headeronly::ScalarType;

int32_t narrow(int64_t number) { return static_cast<int32_t>(number); }

Tensor floats(const Tensor& like, const IntList& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

const int64_t* order_of(const Tensor& order) { return order.const_data_ptr<int64_t>(); }
const int32_t* count_of(const Tensor& count) { return count.const_data_ptr<int32_t>(); }
float* floats_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
}

// Rows of a matrix, or pixels of channels_last images.
struct Rows {
  Tensor tensor;
  int64_t count, stride;
};

Rows rows_of(const Tensor& t) {
  if (t.dim() == 2) return {t, t.size(0), t.stride(0)};
  return {t, t.size(0) * t.size(2) * t.size(3), t.size(1)};
}

struct Packed {
  Rows rows;
  Tensor sums;
};

// The active channels of dY side by side, or one below the other, and their sums if requested.
Packed packed(const Rows& dy, const Tensor& order, const Tensor& count, int64_t most,
              bool transposed, bool summed, const OnDevice& device) {
  const int64_t multiple = 16 / static_cast<int64_t>(dy.tensor.element_size());
  const int64_t stride = ceil_div(transposed ? dy.count : most, multiple) * multiple;
  const Tensor rows = torch::stable::new_empty(dy.tensor, {transposed ? most : dy.count, stride});
  const int64_t blocks = pack_blocks(dy.count, neq_cuda_pack_rows(), multiprocessors());
  Tensor sums;
  if (summed) sums = floats(dy.tensor, {blocks, most});
  check("pack",
        neq_cuda_pack(dtype_of(dy.tensor), dy.tensor.const_data_ptr(), dy.stride, order_of(order),
                      count_of(count), rows.mutable_data_ptr(), stride, floats_of(sums),
                      narrow(blocks), dy.count, narrow(most), transposed, device.stream()));
  return {{rows, dy.count, stride}, sums};
}

// The rows of dY as a product reads them.
Rows rows_to_read(const Tensor& dy, bool packs, const Tensor& order, const Tensor& count,
                  int64_t most, const OnDevice& device) {
  const Rows rows = rows_of(dy);
  return packs ? packed(rows, order, count, most, false, false, device).rows : rows;
}

// Of what a tile of so many columns reads of a row of X.
int64_t tile_bytes(const Tensor& x, int64_t columns) {
  return std::min(columns, x.size(1)) * static_cast<int64_t>(x.element_size());
}
// Of the sums of `most` neurons.
int64_t sums_bytes(int64_t most, int64_t taps, int64_t columns) {
  return most * taps * columns * static_cast<int64_t>(sizeof(float));
}

// Of a convolution, as the launchers take it.
std::array<int32_t, 12> geometry_of(const Tensor& grad_output, const Tensor& input,
                                    const Tensor& weight, const IntList& stride,
                                    const IntList& padding, const IntList& dilation) {
  const std::array<int64_t, 12> numbers{input.size(2),       input.size(3),  grad_output.size(2),
                                        grad_output.size(3), weight.size(2), weight.size(3),
                                        stride[0],           stride[1],      padding[0],
                                        padding[1],          dilation[0],    dilation[1]};
  std::array<int32_t, 12> geometry{};
  std::transform(numbers.begin(), numbers.end(), geometry.begin(), narrow);
  return geometry;
}

// Sums in parts of a weight's gradient, [parts, most, taps, columns], and of the bias's, [parts,
// most], undefined where it is not requested.
struct Sums {
  Tensor parts, bias_parts;

  Sums(const Tensor& weight, int64_t number, int64_t most, int64_t taps, int64_t columns,
       bool want_bias)
      : parts(floats(weight, {number, most, taps, columns})) {
    if (want_bias) bias_parts = floats(weight, {number, most});
  }
};

// The whole gradient.
Grads finished(const Sums& sums, const Tensor& order, const Tensor& count, const Tensor& weight,
               const OnDevice& device) {
  const Tensor &parts = sums.parts, &bias_parts = sums.bias_parts;
  const int64_t k = order.numel(), taps = parts.size(2), columns = parts.size(3);
  const bool wants_bias = bias_parts.defined();
  Tensor grad = torch::stable::empty_like(weight), bias;
  if (wants_bias) bias = torch::stable::new_empty(weight, {k});
  // A neuron's weights lie tap by tap, or all taps of a column together.
  const bool tap_by_tap = taps == 1 || weight.stride(1) == 1;
  check("finish",
        neq_cuda_finish(dtype_of(parts), dtype_of(weight), parts.const_data_ptr(),
                        wants_bias ? bias_parts.const_data_ptr() : nullptr, order_of(order),
                        count_of(count), grad.mutable_data_ptr(),
                        wants_bias ? bias.mutable_data_ptr() : nullptr, k, columns,
                        tap_by_tap ? 1 : taps, tap_by_tap ? columns : 1, narrow(parts.size(0)),
                        narrow(wants_bias ? bias_parts.size(0) : 0), narrow(parts.size(1)),
                        narrow(taps), device.stream()));
  return {grad, bias};
}

}  // namespace

std::tuple<Tensor, Tensor> pack(const Tensor& rows, const Tensor& order, const Tensor& count,
                                int64_t most, bool transposed, bool summed) {
  const OnDevice device(rows);
  const Packed p = packed(rows_of(rows), order, count, most, transposed, summed, device);
  return {p.rows.tensor, p.sums};
}

Tensor scatter_rows(const Tensor& rows, const Tensor& like, const Tensor& order,
                    const Tensor& count) {
  const OnDevice device(rows);
  Tensor out = torch::stable::empty_like(like);
  const int64_t k = order.numel(), size = like.numel() / k;
  check("scatter_rows",
        neq_cuda_finish(dtype_of(rows), dtype_of(like), rows.const_data_ptr(), nullptr,
                        order_of(order), count_of(count), out.mutable_data_ptr(), nullptr, k, size,
                        1, size, 1, 0, narrow(rows.size(0)), 1, device.stream()));
  return out;
}

Grads linear_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const int32_t dtype = dtype_of(weight);
  const Rows x = rows_of(input);
  const int64_t c = input.size(1);
  const NeqTile gathering = neq_cuda_tile(dtype, narrow(most), c, false);
  const bool packs = packs_matrix(most, ceil_div(c, gathering.columns));
  const Rows dy = rows_to_read(grad_output, packs, order, count, most, device);
  const NeqTile tile = packs ? neq_cuda_tile(dtype, narrow(most), c, true) : gathering;
  const SplitK split(dy.count, tile.rows, tile_bytes(input, tile.columns), sums_bytes(most, 1, c),
                     ceil_div(c, tile.columns) * ceil_div(most, tile.neurons), multiprocessors());
  const Sums sums(weight, split.parts, most, 1, c, want_bias);
  check("linear_wgrad",
        neq_cuda_linear_wgrad(dtype, dy.tensor.const_data_ptr(), dy.stride, input.const_data_ptr(),
                              x.stride, order_of(order), count_of(count), floats_of(sums.parts),
                              floats_of(sums.bias_parts), dy.count, split.per_part, c, narrow(most),
                              packs, device.stream()));
  return finished(sums, order, count, weight, device);
}

Grads conv_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                 const IntList& stride, const IntList& padding, const IntList& dilation,
                 const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const int32_t dtype = dtype_of(weight);
  const int64_t c = input.size(1), taps = weight.size(2) * weight.size(3);
  const std::array<int64_t, 3> x_strides{input.stride(0), input.stride(2), input.stride(3)};
  const std::array<int32_t, 12> geometry =
      geometry_of(grad_output, input, weight, stride, padding, dilation);
  if (is_in_one_pass(most, geometry.data())) {
    // Rectangles of X take the place of rows.
    const NeqRectangle rectangle =
        neq_cuda_few_rows_conv_rectangle(dtype, c, narrow(input.size(3)));
    const int64_t column_tiles = ceil_div(c, rectangle.channels);
    const bool packs = packs_one_pass(most, column_tiles);
    const Rows dy = rows_to_read(grad_output, packs, order, count, most, device);
    const int64_t pixels = int64_t{rectangle.height} * rectangle.width;
    const int64_t rectangles = input.size(0) * ceil_div(input.size(2), rectangle.height) *
                               ceil_div(input.size(3), rectangle.width);
    const SplitK split(rectangles * pixels, pixels, tile_bytes(input, rectangle.channels),
                       sums_bytes(most, taps, c), column_tiles, multiprocessors());
    const Sums sums(weight, split.parts, most, taps, c, want_bias);
    const std::array<int32_t, 6> sizes{geometry[0], geometry[1], geometry[2],
                                       geometry[3], geometry[8], geometry[9]};
    check("few_rows_conv",
          neq_cuda_few_rows_conv(
              dtype, dy.tensor.const_data_ptr(), dy.stride, input.const_data_ptr(),
              x_strides.data(), sizes.data(), packs ? nullptr : order_of(order), count_of(count),
              floats_of(sums.parts), floats_of(sums.bias_parts), narrow(split.parts), c,
              narrow(input.size(0)), narrow(most), device.stream()));
    return finished(sums, order, count, weight, device);
  }
  const bool packs = packs_taps(most);
  const Rows dy = rows_to_read(grad_output, packs, order, count, most, device);
  const NeqTile tile = neq_cuda_tile(dtype, narrow(most), c, packs);
  const SplitK split(
      dy.count, tile.rows, tile_bytes(input, tile.columns), sums_bytes(most, taps, c),
      ceil_div(c, tile.columns) * taps * ceil_div(most, tile.neurons), multiprocessors());
  const Sums sums(weight, split.parts, most, taps, c, want_bias);
  check("conv_wgrad",
        neq_cuda_conv_wgrad(dtype, dy.tensor.const_data_ptr(), dy.stride, input.const_data_ptr(),
                            x_strides.data(), geometry.data(), order_of(order), count_of(count),
                            floats_of(sums.parts), floats_of(sums.bias_parts), dy.count,
                            split.per_part, c, narrow(most), packs, device.stream()));
  return finished(sums, order, count, weight, device);
}

Grads depthwise_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const auto strides_of = [](const Tensor& t) {
    return std::array<int64_t, 4>{t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  };
  const int32_t dtype = dtype_of(weight);
  const int64_t k = order.numel(), taps = weight.size(2) * weight.size(3);
  const std::array<int32_t, 12> geometry =
      geometry_of(grad_output, input, weight, stride, padding, dilation);
  const std::array<int64_t, 4> dy_strides = strides_of(grad_output), x_strides = strides_of(input);
  const NeqDepthwiseCut cut =
      neq_cuda_depthwise_cut(dtype, geometry.data(), narrow(input.size(0)), narrow(most),
                             input.stride(1) == 1, narrow(kBlocksEach * multiprocessors()));
  Tensor parts = floats(weight, {cut.parts, most, taps}), bias_parts, bias;
  if (want_bias) {
    bias_parts = floats(weight, {cut.parts, most});
    bias = torch::stable::new_empty(weight, {k});
  }
  check("depthwise_wgrad",
        neq_cuda_depthwise_wgrad(
            dtype, grad_output.const_data_ptr(), dy_strides.data(), input.const_data_ptr(),
            x_strides.data(), geometry.data(), order_of(order), count_of(count), floats_of(parts),
            floats_of(bias_parts), narrow(input.size(0)), narrow(k), narrow(input.size(1)),
            cut.rows, cut.parts, narrow(most), device.stream()));
  Tensor grad = torch::stable::empty_like(weight);
  check("depthwise_finish",
        neq_cuda_depthwise_finish(dtype, floats_of(parts), floats_of(bias_parts), order_of(order),
                                  count_of(count), grad.mutable_data_ptr(),
                                  want_bias ? bias.mutable_data_ptr() : nullptr, k, narrow(taps),
                                  cut.parts, narrow(most), device.stream()));
  return {grad, bias};
}

}  // namespace neq::cuda
