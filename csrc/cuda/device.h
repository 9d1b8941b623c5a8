// The device and the stream that an operator of PyTorch works on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#ifdef NEQ_CUDA_ON_CPU  // the emulator's: tensors are the CPU's

#define NEQ_CUDA_KEY CPU

namespace neq::cuda {

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
