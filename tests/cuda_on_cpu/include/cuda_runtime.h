// The part of CUDA C++ and of its host API that the project's kernels and launchers use, for g++.
//
// Static shared memory is refused: the emulator knows only the dynamic shared memory of a block.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "site.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "static __shared__ memory is not emulated");

#ifdef NEQ_EMU_CHECKED
#define NEQ_EMU_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define NEQ_EMU_UNCHECKED
#endif

// --- what a thread knows of itself ---------------------------------------------------------------

#pragma GCC visibility push(hidden)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// --- synchronization -----------------------------------------------------------------------------

void __syncthreads(neq::emu::Site site = neq::emu::Site::here());
void __syncwarp(unsigned mask = 0xffffffffu, neq::emu::Site site = neq::emu::Site::here());
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

void __threadfence();
unsigned __ballot_sync(unsigned mask, int predicate, neq::emu::Site site = neq::emu::Site::here());

int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
float atomicAdd(float* address, float value);

namespace neq::emu {

enum class Shuffle { kIndex, kXor, kDown };

uint32_t shuffle(unsigned mask, uint32_t word, int argument, int width, Shuffle kind, Site site);

// Reads `bytes` at once through the read-only path.
void load_read_only(void* to, const void* from, size_t bytes);

template <class T>
NEQ_EMU_UNCHECKED inline T shuffle_value(unsigned mask, T value, int argument, int width,
                                         Shuffle kind, Site site) {
  static_assert(sizeof(T) == 4, "shuffles are emulated for 32-bit types");
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  word = shuffle(mask, word, argument, width, kind, site);
  __builtin_memcpy(static_cast<void*>(&value), &word, 4);
  return value;
}

}  // namespace neq::emu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                     neq::emu::Site site = neq::emu::Site::here()) {
  return neq::emu::shuffle_value(mask, value, lane, width, neq::emu::Shuffle::kIndex, site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                         neq::emu::Site site = neq::emu::Site::here()) {
  return neq::emu::shuffle_value(mask, value, bits, width, neq::emu::Shuffle::kXor, site);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                          neq::emu::Site site = neq::emu::Site::here()) {
  return neq::emu::shuffle_value(mask, value, static_cast<int>(distance), width,
                                 neq::emu::Shuffle::kDown, site);
}

template <class T>
__attribute__((always_inline)) inline T __ldg(const T* address) {
#ifdef NEQ_EMU_CHECKED
  T value;
  neq::emu::load_read_only(&value, address, sizeof(T));
  return value;
#else
  return *address;
#endif
}

// --- host ----------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* address, int byte, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class... Parameters>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                        int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace neq::emu {

// A kernel with its arguments: `run(call)` is one thread.
struct Call {
  void (*run)(const Call&);
  const void* kernel;
  const void* arguments;
  size_t argument_bytes;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call);

template <class... Parameters>
struct KernelThread {
  using Arguments = std::tuple<Parameters...>;

  template <size_t... i>
  NEQ_EMU_UNCHECKED static void run_with(const Call& call, std::index_sequence<i...>) {
    const auto& arguments = *static_cast<const Arguments*>(call.arguments);
    reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(call.kernel))(
        std::get<i>(arguments)...);
  }

  NEQ_EMU_UNCHECKED static void run(const Call& call) {
    run_with(call, std::index_sequence_for<Parameters...>());
  }
};

}  // namespace neq::emu

#pragma GCC visibility pop

template <class... Parameters, class... Given>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                                      void (*kernel)(Parameters...), Given&&... given) {
  const std::tuple<Parameters...> arguments(std::forward<Given>(given)...);
  return neq::emu::launch(
      *config, {neq::emu::KernelThread<Parameters...>::run, reinterpret_cast<const void*>(kernel),
                &arguments, sizeof(arguments)});
}
