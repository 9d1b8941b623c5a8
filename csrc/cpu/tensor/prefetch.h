// Memory that will be read soon, fetched little by little while the CPU is busy with other work.
#pragma once

#include <algorithm>
#include <cstdint>

namespace neq {

// `count` pieces of `length` elements. Piece i is number i % inner of a group, or the one that is
// chosen there; groups lie `outer_stride` elements apart, the pieces of a group `stride`.
template <class T>
struct Region {
  const T* data;
  int64_t count, length, inner, stride, outer_stride;
  const int64_t* chosen;

  const T* piece(int64_t i) const {
    const int64_t index = i % inner;
    return data + i / inner * outer_stride + (chosen ? chosen[index] : index) * stride;
  }
};

template <class T>
class Prefetcher {
 public:
  // In `calls` calls of fetch_some.
  Prefetcher(const Region<T>& region, int64_t calls) : region_(region) {
    const int64_t lines = (region.length - 1) / kLine + 1;
    lines_per_call_ = region.length > 0 ? (region.count * lines - 1) / calls + 1 : 0;
  }

  void fetch_some() {
    for (int64_t left = lines_per_call_; left > 0 && piece_ < region_.count;) {
      const T* data = region_.piece(piece_);
      for (; left > 0 && at_ < region_.length; --left, at_ += kLine) {
        __builtin_prefetch(data + at_, 0, 2);
      }
      if (at_ >= region_.length) {
        at_ = 0;
        ++piece_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

  Region<T> region_;
  int64_t lines_per_call_, piece_ = 0, at_ = 0;
};

}  // namespace neq
