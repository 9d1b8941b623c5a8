#include <cuda_runtime.h>

#include "launchers.h"

extern "C" int neq_cuda_multiprocessors(int32_t* count) {
  int device = 0, found = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  }
  *count = found;
  return error;
}
