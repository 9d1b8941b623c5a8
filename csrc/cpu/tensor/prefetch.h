// Memory that will be read soon, fetched little by little while the CPU is busy with other work.
#pragma once

#include <algorithm>
#include <cstdint>

namespace neq {

// `groups` times `count` pieces of `length` elements. Groups lie `group_stride` elements apart, the
// pieces of a group `stride`: number 0, 1, ... of them, or those that are chosen.
template <class T>
struct Region {
  const T* data;
  int64_t groups, group_stride;
  int64_t count, stride, length;
  const int64_t* chosen;
};

template <class T>
class Prefetcher {
 public:
  // In `calls` calls of fetch_some.
  Prefetcher(const Region<T>& region, int64_t calls) : region_(region) {
    Region<T>& r = region_;
    if (r.count == 0 || r.length <= 0) r.groups = 0;
    // Where little lies between the pieces they are fetched as one.
    if (r.chosen == nullptr && r.stride < r.length + kLine) {
      r.length += (r.count - 1) * r.stride;
      r.count = 1;
    }
    const int64_t lines = r.groups * r.count * ((r.length - 1) / kLine + 1);
    lines_per_call_ = lines > 0 ? (lines - 1) / calls + 1 : 0;
  }

  void fetch_some() {
    const Region<T>& r = region_;
    for (int64_t left = lines_per_call_; left > 0 && group_ < r.groups;) {
      const int64_t index = r.chosen ? r.chosen[piece_] : piece_;
      const T* data = r.data + group_ * r.group_stride + index * r.stride;
      for (; left > 0 && at_ < r.length; --left, at_ += kLine) {
        __builtin_prefetch(data + at_, 0, 2);
      }
      if (at_ < r.length) return;
      at_ = 0;
      if (++piece_ < r.count) continue;
      piece_ = 0;
      ++group_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

  Region<T> region_;
  int64_t lines_per_call_, group_ = 0, piece_ = 0, at_ = 0;
};

}  // namespace neq
