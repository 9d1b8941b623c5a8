// Dense tensors in any order of dimensions, and new tensors in the order of an old one.
#pragma once

#include <vector>

#include "checks.h"

namespace neq {

// Dimensions from the slowest to the fastest in memory.
std::vector<int64_t> memory_order(const Tensor& tensor);

// True when the elements fill one block of memory, in the given order of dimensions.
bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order);

// Uninitialised tensor, dense in the given order of dimensions.
Tensor empty_in_order(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order,
                      ScalarType dtype);

// Uninitialised tensor of another dtype, with the sizes and strides of a dense one.
Tensor empty_of_dtype(const Tensor& like, ScalarType dtype);

// tensor itself when it is dense in that order, else a copy that is.
Tensor in_order(const Tensor& tensor, const std::vector<int64_t>& order);

// A dense tensor as [outer][channels][inner] around one of its dimensions, as it lies in memory.
struct ChannelView {
  int64_t outer = 1, channels = 1, inner = 1;
};
ChannelView channel_view(const Tensor& tensor, const std::vector<int64_t>& order, int64_t dim);

std::vector<int64_t> sizes_of(const Tensor& tensor);

// dim counted from the front; raises when it is out of range.
int64_t checked_dim(const Tensor& tensor, int64_t dim);

}  // namespace neq
