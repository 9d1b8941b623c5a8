// What every operator needs to know of its device, and how it says what went wrong there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "launchers.h"

#ifdef NEQ_CUDA_ON_CPU  // the emulator's: tensors are the CPU's

#define NEQ_CUDA_KEY CPU

namespace neq::cuda {

// The device and the stream that an operator works on.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace neq::cuda

#else

#define NEQ_CUDA_KEY CUDA

// Of libtorch_cuda, which a CPU build of PyTorch does not have.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace neq::cuda {

// The device and the stream that an operator works on.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {}

  void* stream() const {
    if (&aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("neq_kernels: expected a CUDA build of PyTorch");
    }
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &current));
    return current;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
};

}  // namespace neq::cuda

#endif

namespace neq::cuda {

inline void check(const char* operation, int code) {
  if (code == 0) return;
  throw std::runtime_error("neq_kernels " + std::string(operation) + ": " +
                           cudaGetErrorString(static_cast<cudaError_t>(code)));
}

// Of the current device; throws where the driver cannot run the kernels, and asks it once for each
// of the first so many devices.
inline int64_t multiprocessors() {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int32_t>, kRemembered> counts{};
  int device = 0;
  check("multiprocessors", cudaGetDevice(&device));
  const bool is_remembered = device < kRemembered;
  int32_t count = is_remembered ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count != 0) return count;
  check("multiprocessors", neq_cuda_multiprocessors(&count));
  if (is_remembered) counts[device].store(count, std::memory_order_relaxed);
  return count;
}

inline int32_t dtype_of(const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Half:
      return neq_float16;
    case torch::headeronly::ScalarType::BFloat16:
      return neq_bfloat16;
    default:
      return neq_float32;
  }
}

}  // namespace neq::cuda
