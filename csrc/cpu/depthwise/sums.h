// The sums of the direct depthwise wgrad.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../simd/kernels.h"
#include "../tensor/scratch.h"

namespace neq::depthwise {

// Sums of one vector of channels (NHWC) or of one channel (NCHW): per tap, and last the bias. A
// lane adds up only so many products in its own precision before they go to double.
template <class T>
class Sums {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(C));
  static constexpr int64_t kMostVectors = 256;

  explicit Sums(int64_t taps) : taps_(taps), lanes_(taps * kLanes, C(0)) {}

  void clear() {
    std::fill(lanes_.begin(), lanes_.end(), C(0));
    totals_.clear();
    std::fill_n(bias_, kLanes, 0.0);
    vectors_ = 0;
  }

  // [tap][lane], to add up to `vectors` more products to.
  C* lanes_for(int64_t vectors) {
    if (vectors_ + vectors > kMostVectors) flush();
    vectors_ += vectors;
    return lanes_.data();
  }

  double* bias_lanes() { return bias_; }

  // out[taps + 1] += a lane.
  void add_lane(int64_t lane, double* out) const {
    for (int64_t tap = 0; tap < taps_; ++tap) {
      out[tap] += static_cast<double>(lanes_[tap * kLanes + lane]);
    }
    if (!totals_.empty()) {
      for (int64_t tap = 0; tap < taps_; ++tap) out[tap] += totals_[tap * kLanes + lane];
    }
    out[taps_] += bias_[lane];
  }

 private:
  void flush() {
    totals_.resize(lanes_.size(), 0.0);
    for (size_t i = 0; i < lanes_.size(); ++i) {
      totals_[i] += static_cast<double>(lanes_[i]);
      lanes_[i] = C(0);
    }
    vectors_ = 0;
  }

  int64_t taps_;
  LineVector<C> lanes_;        // [tap][lane]
  LineVector<double> totals_;  // likewise; none before the first flush
  double bias_[kLanes] = {};
  int64_t vectors_ = 0;
};

}  // namespace neq::depthwise
