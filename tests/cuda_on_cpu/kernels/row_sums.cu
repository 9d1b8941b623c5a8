// Launchers of the other example kernels, called by Python.
#include "row_sums.cuh"

extern "C" {

cudaError_t run_row_sums(const float* x, float* sums, uint2* rounded, float* total,
                         unsigned* positive, int rows, int columns) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((rows + example::kRowsPerBlock - 1) / example::kRowsPerBlock);
  config.blockDim = dim3(32 * example::kRowsPerBlock);
  config.dynamicSmemBytes = sizeof(float) * 2 * example::kRowsPerBlock;
  return cudaLaunchKernelEx(&config, example::row_sums, x, sums, rounded, total, positive, rows,
                            columns);
}

cudaError_t run_copy_16(const float* from, float* to, int n_chunks) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((n_chunks + 63) / 64);
  config.blockDim = dim3(64);
  return cudaLaunchKernelEx(&config, example::copy_16, from, to, n_chunks);
}

}  // extern "C"
