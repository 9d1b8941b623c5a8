// What each thread has to do in a parallel loop, and which memory it writes: told to a test.
#pragma once

#include <cstdint>
#include <vector>

namespace neq {

class ShareTable {
 public:
  // `outer` times `inner` stretches of `length` bytes of some memory, whose first byte begins a
  // line.
  struct Writes {
    int64_t memory, begin, length;
    int64_t inner = 1, inner_stride = 0, outer = 1, outer_stride = 0;
  };
  static constexpr int64_t kColumns = 10;

  void add_work(int64_t loop, int64_t share, int64_t work) {
    numbers_.insert(numbers_.end(), {loop, share, work, 0, 0, 0, 0, 0, 0, 0});
  }
  void add_writes(int64_t loop, int64_t share, const Writes& w) {
    numbers_.insert(numbers_.end(), {loop, share, 0, w.memory, w.begin, w.length, w.inner,
                                     w.inner_stride, w.outer, w.outer_stride});
  }

  const std::vector<int64_t>& numbers() const { return numbers_; }

 private:
  std::vector<int64_t> numbers_;
};

}  // namespace neq
