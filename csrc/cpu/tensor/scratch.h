// Memory that stays with a thread from one call to the next: what is allocated and freed in every
// call is given back to the system, and costs a page fault for every page when it returns.
#pragma once

#include <cstdint>
#include <memory>

namespace neq {

template <class T>
class Scratch {
 public:
  // Its contents are what was left there, and nothing when it has to grow.
  T* at_least(int64_t size) {
    if (size > size_) {
      data_.reset();
      data_.reset(new T[size]);
      size_ = size;
    }
    return data_.get();
  }

  T* data() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

}  // namespace neq
