// The launcher of the example product, called by Python.
#include "product.cuh"

namespace example {

template <class T, bool kRows, int kStages>
cudaError_t launch_product(const void* a, const void* b, float* out, float* parts, int* tickets,
                           int m, int n, int k, int splits) {
  constexpr size_t kSharedBytes = sizeof(Shared<T, kRows, kStages>);
  const auto kernel = product<T, kRows, kStages>;
  if (splits == 0) {
    int device, multiprocessors;
    if (cudaError_t error = cudaGetDevice(&device)) return error;
    if (cudaError_t error =
            cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    splits = multiprocessors;
  }
  if (kSharedBytes > 48 * 1024) {
    if (cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kSharedBytes))) {
      return error;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n + kTile - 1) / kTile, (m + kTile - 1) / kTile, splits);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  if (cudaError_t error = cudaMemsetAsync(
          tickets, 0, sizeof(int) * config.gridDim.x * config.gridDim.y, config.stream)) {
    return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<const T*>(a), static_cast<const T*>(b),
                            out, parts, tickets, m, n, k);
}

}  // namespace example

extern "C" {

// By rows, the reduction is the last dimension of both operands, and they are of __nv_bfloat16;
// otherwise it is the first, and they are of __half.
cudaError_t run_product(int by_rows, const void* a, const void* b, float* out, float* parts,
                        int* tickets, int m, int n, int k, int splits) {
  using namespace example;
  const auto launch =
      by_rows ? launch_product<__nv_bfloat16, true, 6> : launch_product<__half, false, 2>;
  return launch(a, b, out, parts, tickets, m, n, k, splits);
}

}  // extern "C"
