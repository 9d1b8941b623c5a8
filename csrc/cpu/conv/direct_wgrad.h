// Weight gradient of the active output channels, computed directly from the operands as they lie.
#pragma once

#include <vector>

#include "../tensor/share_table.h"
#include "convolution.h"

namespace neq {

// T and G: float or double, or T a half type, which is multiplied in float, and G the same one or
// float.
//
// p.active: all output channels, the n active ones first.
// channels_last: pixels of both operands lie channels innermost.
// gradient: of the weight, output channels outermost; frozen ones become 0. Inside of one lie the
// taps, or, with taps_inside, the input channels first and the taps inside of them.
//
// Returns the bias gradient of the active channels, empty unless it is requested.
template <class T, class G>
std::vector<double> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last,
                                 G* gradient, bool taps_inside);

// The shares of `threads` threads, in float or in a half type: loop 0 adds up products, loop 1
// writes the gradient. Memory 0 holds the sums, 1 the gradient, 2 the bias.
void direct_wgrad_shares(ConvProblem p, bool channels_last, bool taps_inside, bool half,
                         int64_t threads, ShareTable& shares);

}  // namespace neq
