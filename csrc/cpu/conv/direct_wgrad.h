// Weight gradient of the active output channels, computed directly from the operands as they lie.
#pragma once

#include <vector>

#include "convolution.h"

namespace neq {

// Only float and double.
//
// p.active: all output channels, the n active ones first.
// channels_last: pixels of both operands lie channels innermost.
// gradient: of the weight, output channels outermost; frozen ones become 0. Inside of one lie the
// taps, or, with taps_inside, the input channels first and the taps inside of them.
//
// Returns the bias gradient of the active channels, empty unless it is requested.
template <class T>
std::vector<double> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last,
                                 T* gradient, bool taps_inside);

extern template std::vector<double> direct_wgrad(ConvProblem, const float*, const float*, bool,
                                                 float*, bool);
extern template std::vector<double> direct_wgrad(ConvProblem, const double*, const double*, bool,
                                                 double*, bool);

}  // namespace neq
