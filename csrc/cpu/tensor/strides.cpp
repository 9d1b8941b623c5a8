#include "strides.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

namespace neq {

std::vector<int64_t> memory_order(const Tensor& tensor) {
  std::vector<int64_t> order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  const auto strides = tensor.strides();
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (tensor.size(*dim) == 1) continue;
    if (tensor.stride(*dim) != expected) return false;
    expected *= tensor.size(*dim);
  }
  return true;
}

namespace {

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty_of_dtype(const Tensor& like, ScalarType dtype) {
  return empty_strided(like.sizes().data(), like.strides().data(), like.dim(), dtype);
}

Tensor empty_in_order(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order,
                      ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[*dim] = stride;
    stride *= std::max<int64_t>(sizes[*dim], 1);
  }
  return empty_strided(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
}

Tensor in_order(const Tensor& tensor, const std::vector<int64_t>& order) {
  if (is_dense(tensor, order)) return tensor;
  Tensor copy = empty_in_order(sizes_of(tensor), order, tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

ChannelView channel_view(const Tensor& tensor, const std::vector<int64_t>& order, int64_t dim) {
  ChannelView view;
  view.channels = tensor.size(dim);
  bool before = true;
  for (int64_t d : order) {
    if (d == dim) {
      before = false;
    } else {
      (before ? view.outer : view.inner) *= tensor.size(d);
    }
  }
  return view;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

int64_t checked_dim(const Tensor& tensor, int64_t dim) {
  const int64_t rank = tensor.dim();
  require(-rank <= dim && dim < rank, "dim: expected ", -rank, " <= dim < ", rank, ", got ", dim);
  return dim < 0 ? dim + rank : dim;
}

}  // namespace neq
