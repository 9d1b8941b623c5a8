// Memory that stays with a thread from one call to the next: what is allocated and freed in every
// call is given back to the system, and costs a page fault for every page when it returns.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace neq {

// Memory of its own lines: what a thread writes there drives nothing out of another one's cache.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr size_t kLine = 64;

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(size_t count) {
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    return static_cast<T*>(::operator new(bytes, std::align_val_t{kLine}));
  }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{kLine}); }

  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

template <class T>
class Scratch {
 public:
  // Its contents are what was left there, and nothing when it has to grow.
  T* at_least(int64_t size) {
    if (size > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(LineAllocator<T>().allocate(size));
      size_ = size;
    }
    return data_.get();
  }

  T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { LineAllocator<T>().deallocate(data, 0); }
  };

  std::unique_ptr<T[], Delete> data_;
  int64_t size_ = 0;
};

}  // namespace neq
