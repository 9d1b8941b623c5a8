// Launches of kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ceil_div.h"

namespace neq::cuda {

// Shared memory that a block gets without being asked for.
constexpr size_t kSharedByDefault = 48 << 10;

template <class Parameters>
cudaError_t launch(void (*kernel)(Parameters), dim3 grid, unsigned threads, size_t shared,
                   void* stream, const Parameters& parameters) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > kSharedByDefault) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

}  // namespace neq::cuda
