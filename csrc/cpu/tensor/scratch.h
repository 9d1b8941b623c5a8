// Memory that stays with a thread from one call to the next: what is allocated and freed in every
// call is given back to the system, and costs a page fault for every page when it returns.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace neq {

template <class T>
class Scratch {
 public:
  // Its contents are what was left there, and nothing when it has to grow.
  T* at_least(int64_t size) {
    if (size > size_) {
      data_.reset();
      size_ = size;
      const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
      data_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{kLine})));
    }
    return data_.get();
  }

  T* data() const { return data_.get(); }

 private:
  static constexpr size_t kLine = 64;
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{kLine}); }
  };

  std::unique_ptr<T[], Delete> data_;
  int64_t size_ = 0;
};

}  // namespace neq
