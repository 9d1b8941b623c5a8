// The bodies of csrc/cuda/common/ptx.cuh when g++ compiles the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#pragma GCC visibility push(hidden)

namespace neq::emu {

// Copies that become visible with `cp_async_wait`, at the earliest or at the latest.
void copy_async_wait(int groups_left);

void load_matrices(uint32_t* registers, const void* row, int n_matrices, bool transposed,
                   Site site);

using MultiplyTile = void (*)(const uint32_t (*)[8], float (*)[4]);
void multiply_half(const uint32_t (*operands)[8], float (*sums)[4]);
void multiply_bfloat16(const uint32_t (*operands)[8], float (*sums)[4]);
void multiply(MultiplyTile tile, float* sums, const uint32_t* a, const uint32_t* b, Site site);

}  // namespace neq::emu

namespace neq::ptx {

unsigned char* dynamic_shared();

void cp_async_up_to_16(void* shared, const void* global, int bytes);
void cp_async_16(void* shared, const void* global, bool take);
void cp_async_commit();

template <int kGroupsLeft>
__forceinline__ void cp_async_wait() {
  emu::copy_async_wait(kGroupsLeft);
}

__forceinline__ void ldmatrix_x2(uint32_t (&registers)[2], const void* row,
                                 emu::Site site = emu::Site::here()) {
  emu::load_matrices(registers, row, 2, false, site);
}

__forceinline__ void ldmatrix_x2_trans(uint32_t (&registers)[2], const void* row,
                                       emu::Site site = emu::Site::here()) {
  emu::load_matrices(registers, row, 2, true, site);
}

__forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row,
                                 emu::Site site = emu::Site::here()) {
  emu::load_matrices(registers, row, 4, false, site);
}

__forceinline__ void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row,
                                       emu::Site site = emu::Site::here()) {
  emu::load_matrices(registers, row, 4, true, site);
}

template <class T>
__forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               emu::Site site = emu::Site::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  emu::multiply(std::is_same_v<T, __half> ? emu::multiply_half : emu::multiply_bfloat16, d, a, b,
                site);
}

#ifdef NEQ_EMU_CHECKED
uint4 load_16(const void* address);
uint4 load_16_streaming(const void* address);
void store_16(void* address, uint4 value);
#else
inline uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }
inline uint4 load_16_streaming(const void* address) { return *static_cast<const uint4*>(address); }
inline void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }
#endif

}  // namespace neq::ptx

#pragma GCC visibility pop
