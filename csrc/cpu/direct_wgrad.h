// Weight gradient of a few output channels, computed directly from the operands as they lie.
#pragma once

#include <vector>

#include "convolution.h"

namespace neq {

// Only float and double.
template <class T>
struct DirectWgrad {
  // Element j of neuron i's part p is sums[(p * n + i) * row + j]; the parts one after the other,
  // `size` elements each, are the neuron's weights, channels innermost.
  std::vector<T> sums;
  int64_t parts, size, row;
  std::vector<double> bias;  // [n], empty unless wanted
};

// `channels_last`: pixels of both operands lie channels innermost.
template <class T>
DirectWgrad<T> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last);

extern template DirectWgrad<float> direct_wgrad(ConvProblem, const float*, const float*, bool);
extern template DirectWgrad<double> direct_wgrad(ConvProblem, const double*, const double*, bool);

}  // namespace neq
