// Weight gradient of a few output channels, computed directly from the operands as they lie.
#pragma once

#include <vector>

#include "convolution.h"

namespace neq {

// rows: [n][tap][channel] sums in `T`; bias: [n], empty unless wanted. `channels_last`: pixels of
// both operands lie channels innermost. Only float and double.
template <class T>
struct DirectWgrad {
  std::vector<T> rows;
  std::vector<double> bias;
};

template <class T>
DirectWgrad<T> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last);

extern template DirectWgrad<float> direct_wgrad(ConvProblem, const float*, const float*, bool);
extern template DirectWgrad<double> direct_wgrad(ConvProblem, const double*, const double*, bool);

}  // namespace neq
