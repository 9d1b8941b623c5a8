// The shares of the threads in a depthwise wgrad, for a test.
#pragma once

#include "../conv/convolution.h"
#include "../tensor/share_table.h"

namespace neq {

// Of `threads` threads, in float: loop 0 adds up products; memory 0 holds the sums of the parts.
void depthwise_wgrad_shares(const ConvProblem& p, bool channels_last, int64_t threads,
                            ShareTable& table);

}  // namespace neq
