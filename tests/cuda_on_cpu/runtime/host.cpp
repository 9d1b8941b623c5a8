// CUDA's host API, and the functions that Python calls.
#include <sys/mman.h>

#include <unordered_map>

#include "check.h"
#include "error.h"
#include "json.h"
#include "machine.h"

using namespace neq::emu;

namespace {

constexpr size_t kSharedWithoutAttribute = 48 * 1024, kMaxShared = 228 * 1024;

cudaError_t last_error = cudaSuccess;
cudaError_t first_error = cudaSuccess;
std::string refusal;
std::unordered_map<const void*, size_t> shared_allowed;
JsonList launches;

cudaError_t refuse(cudaError_t code, const std::string& why) {
  last_error = code;
  if (first_error == cudaSuccess) {
    first_error = code;
    refusal = why;
  }
  return code;
}

std::string text(const dim3& size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

std::string sizes(const dim3& size) {
  return "[" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + "]";
}

// In the middle of memory of its own, so that an access that misses it narrowly does no harm.
unsigned char* allocate_shared() {
  constexpr size_t kAround = 1 << 20;
  void* memory = mmap(nullptr, kMaxShared + 2 * kAround, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return static_cast<unsigned char*>(memory) + kAround;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const Call& call) {
  const dim3 &grid = config.gridDim, &threads = config.blockDim;
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (n_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      n_blocks > 0xffffffffu) {
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + text(grid) + " blocks");
  }
  const uint64_t n_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (n_threads == 0 || n_threads > kMaxThreads || threads.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, "blocks of " + text(threads) + " threads");
  }
  const auto allowed = shared_allowed.find(call.kernel);
  const size_t limit = allowed == shared_allowed.end() ? kSharedWithoutAttribute : allowed->second;
  if (config.dynamicSmemBytes > limit) {
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory; this kernel may "
                                             "have " +
                                             std::to_string(limit));
  }
  return cudaSuccess;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return refuse(cudaErrorInvalidDevice, "only device 0 exists");
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedWithoutAttribute;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(settings.shared_limit);
      return cudaSuccess;
  }
  return refuse(cudaErrorInvalidValue, "an attribute that is not emulated");
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > settings.shared_limit) {
    return refuse(cudaErrorInvalidValue, std::to_string(value) +
                                             " bytes of dynamic shared memory; a block has at "
                                             "most " +
                                             std::to_string(settings.shared_limit));
  }
  shared_allowed[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int byte, size_t bytes, cudaStream_t) {
  if (failed) return cudaErrorLaunchFailure;
  const Call none = {nullptr, nullptr, nullptr, 0};
  launched = {&none, {}, {}, 0, now};
  if constexpr (kChecked) {
    start_checking();
    check_host_write(address, bytes, "cudaMemsetAsync");
    if (failed) return cudaErrorLaunchFailure;
    launches.add(
        Json().add("name", quoted("cudaMemsetAsync")).add("traffic", traffic_json()).object());
  }
  std::memset(address, byte, bytes);
  return cudaSuccess;
}

namespace neq::emu {

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call) {
  if (failed) return cudaErrorLaunchFailure;
  const cudaError_t code = check_launch(config, call);
  if (code != cudaSuccess) return code;
  if (shared_memory == nullptr) shared_memory = allocate_shared();
  launched = {&call, config.gridDim, config.blockDim, config.dynamicSmemBytes, now};
  run_blocks();
  if (failed) return last_error = cudaErrorLaunchFailure;
  Json json;
  json.add("kernel", offset_of(call.kernel));
  json.add("grid", sizes(config.gridDim)).add("block", sizes(config.blockDim));
  json.add("shared_bytes", config.dynamicSmemBytes);
  if constexpr (kChecked) json.add("traffic", traffic_json());
  launches.add(json.object());
  return cudaSuccess;
}

}  // namespace neq::emu

#pragma GCC visibility push(default)

extern "C" {

void neq_emu_begin(int order, uint64_t seed, int copies_at_issue, int multiprocessors,
                   int compute_capability, uint64_t shared_limit) {
  settings = {static_cast<Order>(order), seed,        copies_at_issue != 0, multiprocessors,
              compute_capability,        shared_limit};
  last_error = first_error = cudaSuccess;
  refusal.clear();
  shared_allowed.clear();
  launches = {};
  failed = false;
  error.clear();
  if constexpr (kChecked) clear_regions();
}

void neq_emu_add_region(const char* name, const void* base, uint64_t bytes, uint64_t item_bytes,
                        int writable) {
  if constexpr (kChecked) add_region(name, base, bytes, item_bytes, writable != 0);
}

// Of the run until now; the text lives until the next call.
const char* neq_emu_result() {
  static std::string result;
  Json json;
  json.add("error", failed ? error : "null").add("refusal", quoted(refusal));
  json.add("code", static_cast<int>(first_error));
  json.add("code_name", quoted(cudaGetErrorString(first_error)));
  result = json.add("launches", launches.list()).object();
  return result.c_str();
}

const char* neq_emu_error_name(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"

#pragma GCC visibility pop
