// Stands in for CUDA's runtime: launches are written down instead of made. The host code that nvcc
// makes of a .cu file registers its kernels here, by the names that they have in the cubin.
#include <cuda_runtime_api.h>

#include <map>
#include <sstream>
#include <string>

namespace {

struct Kernel {
  std::string name;
  size_t most_dynamic_shared = 48 << 10;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> known;
  return known;
}

std::ostringstream launches;
std::string taken;

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
} pushed;

cudaError_t record(const void* function, dim3 grid, dim3 block, size_t shared) {
  const Kernel& kernel = kernels().at(function);
  if (shared > kernel.most_dynamic_shared) return cudaErrorInvalidValue;
  launches << kernel.name << ' ' << grid.x * grid.y * grid.z << ' ' << block.x * block.y * block.z
           << ' ' << shared << '\n';
  return cudaSuccess;
}

}  // namespace

extern "C" {

// A line for each launch since the last call: name, blocks, threads of a block, bytes of dynamic
// shared memory.
const char* neq_take_launches() {
  taken = launches.str();
  launches.str("");
  return taken.c_str();
}

// --- what the host code calls --------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host] = {name};
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  pushed = {grid, block, shared};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                               cudaStream_t) {
  return record(kernel, grid, block, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return record(function, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    kernels().at(function).most_dynamic_shared = static_cast<size_t>(value);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 108;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = NEQ_ARCH / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = NEQ_ARCH % 10;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

}  // extern "C"
