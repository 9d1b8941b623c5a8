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
      data_.reset(new (std::align_val_t{kCacheLine}) T[size]);
      size_ = size;
    }
    return data_.get();
  }

  T* data() const { return data_.get(); }

 private:
  // Vectors that lie across two lines are read at half the speed.
  static constexpr size_t kCacheLine = 64;

  struct Delete {
    void operator()(T* data) const { operator delete[](data, std::align_val_t{kCacheLine}); }
  };

  std::unique_ptr<T[], Delete> data_;
  int64_t size_ = 0;
};

}  // namespace neq
