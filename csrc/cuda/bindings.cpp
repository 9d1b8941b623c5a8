// The private leaf ops for GPU tensors, on PyTorch's stable ABI: they allocate, decide how the work
// is cut, and launch. neq_kernels/backends/cuda.py gives them what they serve: rows that start at
// multiples of 16 bytes.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "launchers.h"

namespace neq::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;
using Grads = std::tuple<Tensor, Tensor>;

// Blocks for each multiprocessor: so that some compute while others wait for memory.
constexpr int64_t kBlocksEach = 2, kPackBlocksEach = 3;
// Each block first finds its neurons, fills its stages and reads what borders on its rows: these
// are to be at least so many of the tile's.
constexpr int64_t kLeastSteps = 6;
// So that the sums of all parts stay in L2.
constexpr int64_t kMostSumsBytes = 16 << 20;
// Up to so many neurons are gathered where one tile has all columns; more are packed first.
constexpr int64_t kMostGathered = 32, kFewRows = 16;
// Padding that a convolution in one pass may have.
constexpr int64_t kMostPadding = 2;
// Where several tiles of a convolution in one pass share the columns, each reads dY again: neurons
// times tiles up to which that moves less than packing does.
constexpr int64_t kMostReadings = 8;

void check(const char* operation, int code) {
  if (code == 0) return;
  throw std::runtime_error("neq_kernels " + std::string(operation) + ": " +
                           cudaGetErrorString(static_cast<cudaError_t>(code)));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return neq_float16;
    case ScalarType::BFloat16:
      return neq_bfloat16;
    default:
      return neq_float32;
  }
}

// Of the current device; the driver is asked once for each of the first so many devices.
int64_t multiprocessors() {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int32_t>, kRemembered> counts{};
  int device = 0;
  check("multiprocessors", cudaGetDevice(&device));
  const bool is_remembered = device < kRemembered;
  int32_t count = is_remembered ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count != 0) return count;
  check("multiprocessors", neq_cuda_multiprocessors(&count));
  if (is_remembered) counts[device].store(count, std::memory_order_relaxed);
  return count;
}

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
  const Tensor& tensor;
  int64_t count, stride;
};

Rows rows_of(const Tensor& t) {
  if (t.dim() == 2) return {t, t.size(0), t.stride(0)};
  return {t, t.size(0) * t.size(2) * t.size(3), t.size(1)};
}

struct Packed {
  Tensor rows, sums;
  int64_t stride;
};

Packed packed(const Rows& dy, const Tensor& order, const Tensor& count, int64_t most,
              int64_t columns, bool transposed, bool summed, const OnDevice& device) {
  const int64_t multiple = 16 / static_cast<int64_t>(dy.tensor.element_size());
  Packed p;
  p.stride = ceil_div(transposed ? dy.count : columns, multiple) * multiple;
  p.rows = torch::stable::new_empty(dy.tensor, {transposed ? most : dy.count, p.stride});
  const int64_t blocks = std::min(ceil_div(dy.count, kLeastSteps * neq_cuda_pack_rows()),
                                  kPackBlocksEach * multiprocessors());
  if (summed) p.sums = floats(dy.tensor, {blocks, most});
  check("pack", neq_cuda_pack(dtype_of(dy.tensor), dy.tensor.const_data_ptr(), dy.stride,
                              order_of(order), count_of(count), p.rows.mutable_data_ptr(), p.stride,
                              floats_of(p.sums), static_cast<int32_t>(blocks), dy.count,
                              static_cast<int32_t>(most), transposed, device.stream()));
  return p;
}

// Parts of a sum over t rows, of which each has a multiple of the tile's.
struct Cut {
  int64_t parts, per_part;

  // A block reads `row_bytes` of each of its rows, and of all tiles a part has `sums_bytes`. With p
  // parts blocks take, if each has a multiprocessor's share of the memory's bandwidth B,
  //
  //   multiprocessors * t * row_bytes / (p * B), and the sums 2 * p * sums_bytes / (2 * B),
  //
  // because they are written, read again, and stay in L2, which is about twice as fast. That is
  // least where both are equal.
  Cut(int64_t t, int64_t rows, int64_t row_bytes, int64_t sums_bytes, int64_t tiles) {
    const int64_t processors = multiprocessors();
    const double operands = static_cast<double>(processors * t) * static_cast<double>(row_bytes);
    const auto fastest =
        static_cast<int64_t>(std::sqrt(operands / static_cast<double>(sums_bytes)));
    const int64_t wanted = ceil_div(kBlocksEach * processors, tiles);
    const int64_t most =
        std::min({t / (kLeastSteps * rows), fastest, wanted, kMostSumsBytes / sums_bytes});
    per_part = ceil_div(ceil_div(t, std::max(most, int64_t{1})), rows) * rows;
    parts = ceil_div(t, per_part);
  }
};

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
  std::array<int32_t, 12> narrow{};
  std::transform(numbers.begin(), numbers.end(), narrow.begin(),
                 [](int64_t number) { return static_cast<int32_t>(number); });
  return narrow;
}

// The whole gradient. `parts`: [parts, most, taps, columns]; `bias_parts`: [parts, most], or
// undefined where the bias has no gradient.
Grads finished(const Tensor& parts, const Tensor& bias_parts, const Tensor& order,
               const Tensor& count, const Tensor& weight, const OnDevice& device) {
  const int64_t k = order.numel(), taps = parts.size(2), columns = parts.size(3);
  const bool wants_bias = bias_parts.defined();
  Tensor grad = torch::stable::empty_like(weight), bias;
  if (wants_bias) bias = torch::stable::new_empty(weight, {k});
  // A neuron's weights lie tap by tap, or all taps of a column together.
  const bool tap_by_tap = taps == 1 || weight.stride(1) == 1;
  check("finish",
        neq_cuda_finish(
            dtype_of(parts), dtype_of(weight), parts.const_data_ptr(),
            wants_bias ? bias_parts.const_data_ptr() : nullptr, order_of(order), count_of(count),
            grad.mutable_data_ptr(), wants_bias ? bias.mutable_data_ptr() : nullptr, k, columns,
            tap_by_tap ? 1 : taps, tap_by_tap ? columns : 1, static_cast<int32_t>(parts.size(0)),
            static_cast<int32_t>(wants_bias ? bias_parts.size(0) : 0),
            static_cast<int32_t>(parts.size(1)), static_cast<int32_t>(taps), device.stream()));
  return {grad, bias};
}

}  // namespace

// Of the current GPU; throws where the driver cannot run the kernels.
int64_t number_of_multiprocessors() { return multiprocessors(); }

// `rows`, matrix or channels_last images: the active channels side by side, [rows, at least most],
// or transposed, [most, at least rows]; and float sums in parts, [parts, most].
std::tuple<Tensor, Tensor> pack(const Tensor& rows, const Tensor& order, const Tensor& count,
                                int64_t most, bool transposed, bool summed) {
  const OnDevice device(rows);
  const Packed p = packed(rows_of(rows), order, count, most, most, transposed, summed, device);
  return {p.rows, p.sums};
}

// Like `like`: neurons order[:count] hold `rows`, the others are 0. A neuron's elements, a multiple
// of 4, lie one after the other in both.
Tensor scatter_rows(const Tensor& rows, const Tensor& like, const Tensor& order,
                    const Tensor& count) {
  const OnDevice device(rows);
  Tensor out = torch::stable::empty_like(like);
  const int64_t k = order.numel(), size = like.numel() / k;
  check("scatter_rows",
        neq_cuda_finish(dtype_of(rows), dtype_of(like), rows.const_data_ptr(), nullptr,
                        order_of(order), count_of(count), out.mutable_data_ptr(), nullptr, k, size,
                        1, size, 1, 0, static_cast<int32_t>(rows.size(0)), 1, device.stream()));
  return out;
}

Grads linear_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const int32_t dtype = dtype_of(weight);
  Rows dy = rows_of(grad_output);
  const Rows x = rows_of(input);
  const int64_t t = dy.count, c = input.size(1);
  const auto tile_for = [&](bool is_packed) {
    return neq_cuda_tile(dtype, static_cast<int32_t>(most), c, is_packed);
  };
  // Where several tiles share the columns, each would read dY again.
  const bool packs = most > kMostGathered || (most <= kFewRows && c > tile_for(false).columns);
  Packed p;
  const void* from = grad_output.const_data_ptr();
  if (packs) {
    p = packed(dy, order, count, most, most, false, false, device);
    from = p.rows.const_data_ptr();
    dy.stride = p.stride;
  }
  const NeqTile tile = tile_for(packs);
  const Cut cut(t, tile.rows, tile_bytes(input, tile.columns), sums_bytes(most, 1, c),
                ceil_div(c, tile.columns) * ceil_div(most, tile.neurons));
  Tensor parts = floats(weight, {cut.parts, most, 1, c}), bias_parts;
  if (want_bias) bias_parts = floats(weight, {cut.parts, most});
  check("linear_wgrad",
        neq_cuda_linear_wgrad(dtype, from, dy.stride, input.const_data_ptr(), x.stride,
                              order_of(order), count_of(count), floats_of(parts),
                              floats_of(bias_parts), t, cut.per_part, c, static_cast<int32_t>(most),
                              packs, device.stream()));
  return finished(parts, bias_parts, order, count, weight, device);
}

// Of channels_last images.
Grads conv_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                 const IntList& stride, const IntList& padding, const IntList& dilation,
                 const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const int32_t dtype = dtype_of(weight);
  const auto narrow = [](int64_t number) { return static_cast<int32_t>(number); };
  Rows dy = rows_of(grad_output);
  const int64_t t = dy.count, c = input.size(1), taps = weight.size(2) * weight.size(3);
  const std::array<int64_t, 3> x_strides{input.stride(0), input.stride(2), input.stride(3)};
  const bool in_one_pass = most <= kFewRows && weight.size(2) == 3 && weight.size(3) == 3 &&
                           stride == IntList{1, 1} && dilation == IntList{1, 1} &&
                           padding[0] <= kMostPadding && padding[1] <= kMostPadding;
  const NeqRectangle rectangle = neq_cuda_few_rows_conv_rectangle(dtype, c, narrow(input.size(3)));
  const int64_t column_tiles = ceil_div(c, rectangle.channels);
  const bool packs =
      in_one_pass ? column_tiles > 1 && column_tiles * most > kMostReadings : most > kMostGathered;
  Packed p;
  const void* from = grad_output.const_data_ptr();
  if (packs) {
    p = packed(dy, order, count, most, most, false, false, device);
    from = p.rows.const_data_ptr();
    dy.stride = p.stride;
  }
  if (in_one_pass) {
    // Rectangles of X take the place of rows.
    const int64_t pixels = int64_t{rectangle.height} * rectangle.width;
    const int64_t rectangles = input.size(0) * ceil_div(input.size(2), rectangle.height) *
                               ceil_div(input.size(3), rectangle.width);
    const Cut cut(rectangles * pixels, pixels, tile_bytes(input, rectangle.channels),
                  sums_bytes(most, taps, c), column_tiles);
    Tensor parts = floats(weight, {cut.parts, most, taps, c}), bias_parts;
    if (want_bias) bias_parts = floats(weight, {cut.parts, most});
    const std::array<int32_t, 6> sizes{narrow(input.size(2)),       narrow(input.size(3)),
                                       narrow(grad_output.size(2)), narrow(grad_output.size(3)),
                                       narrow(padding[0]),          narrow(padding[1])};
    check("few_rows_conv",
          neq_cuda_few_rows_conv(dtype, from, dy.stride, input.const_data_ptr(), x_strides.data(),
                                 sizes.data(), packs ? nullptr : order_of(order), count_of(count),
                                 floats_of(parts), floats_of(bias_parts), narrow(cut.parts), c,
                                 narrow(input.size(0)), narrow(most), device.stream()));
    return finished(parts, bias_parts, order, count, weight, device);
  }
  const NeqTile tile = neq_cuda_tile(dtype, narrow(most), c, packs);
  const Cut cut(t, tile.rows, tile_bytes(input, tile.columns), sums_bytes(most, taps, c),
                ceil_div(c, tile.columns) * taps * ceil_div(most, tile.neurons));
  Tensor parts = floats(weight, {cut.parts, most, taps, c}), bias_parts;
  if (want_bias) bias_parts = floats(weight, {cut.parts, most});
  const std::array<int32_t, 12> geometry =
      geometry_of(grad_output, input, weight, stride, padding, dilation);
  check("conv_wgrad",
        neq_cuda_conv_wgrad(dtype, from, dy.stride, input.const_data_ptr(), x_strides.data(),
                            geometry.data(), order_of(order), count_of(count), floats_of(parts),
                            floats_of(bias_parts), t, cut.per_part, c, narrow(most), packs,
                            device.stream()));
  return finished(parts, bias_parts, order, count, weight, device);
}

// Of images with any strides; a channel of the weight is [1, R, S], contiguous.
Grads depthwise_wgrad(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                      const IntList& stride, const IntList& padding, const IntList& dilation,
                      const Tensor& order, const Tensor& count, int64_t most, bool want_bias) {
  const OnDevice device(weight);
  const auto narrow = [](int64_t number) { return static_cast<int32_t>(number); };
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

// Steps of the active neurons of many parameters of `first`'s dtype and device, found by the tables
// of neq_kernels/backends/gpu.py.
void sgd_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
               int64_t parameters, int64_t blocks, double lr, double momentum, double dampening,
               double weight_decay, bool with_momentum, bool nesterov, bool maximize) {
  const OnDevice device(first);
  check("sgd_rows_",
        neq_cuda_sgd_rows(dtype_of(first), addresses.const_data_ptr<int64_t>(),
                          shapes.const_data_ptr<int64_t>(), static_cast<int32_t>(parameters),
                          blocks, lr, momentum, dampening, weight_decay, with_momentum, nesterov,
                          maximize, device.stream()));
}

void adam_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
                int64_t parameters, int64_t blocks, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool amsgrad, bool decoupled, bool maximize) {
  const OnDevice device(first);
  check("adam_rows_",
        neq_cuda_adam_rows(dtype_of(first), addresses.const_data_ptr<int64_t>(),
                           shapes.const_data_ptr<int64_t>(), static_cast<int32_t>(parameters),
                           blocks, lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled,
                           maximize, device.stream()));
}

}  // namespace neq::cuda

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
  m.impl("multiprocessors", TORCH_BOX(&neq::cuda::number_of_multiprocessors));
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
