// The instructions that CUDA C++ has no name for. All inline PTX of the project is here; what needs
// sm_80 has a plain substitute. g++ takes the bodies of tests/cuda_on_cpu instead, which emulate
// it.
#pragma once

#ifndef __CUDACC__
#include <ptx_on_cpu.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "before_sm_80.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define NEQ_BEFORE_SM_80 1
#else
#define NEQ_BEFORE_SM_80 0
#endif

namespace neq::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The shared memory of the block, as much as the launch asked for, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char neq_dynamic_shared[];
  return neq_dynamic_shared;
}

// --- asynchronous copies -------------------------------------------------------------------------

// Starts a copy of 16 bytes past L1 and the registers: only the first `bytes` (a multiple of 2) are
// read, the others become zeros. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void cp_async_up_to_16(void* shared, const void* global, int bytes) {
#if NEQ_BEFORE_SM_80
  before_sm_80::copy_up_to_16(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#endif
}

// All of them, or zeros instead unless `take`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool take) {
#if NEQ_BEFORE_SM_80
  before_sm_80::copy_16(shared, global, take);
#else
  cp_async_up_to_16(shared, global, take ? 16 : 0);
#endif
}

// Makes a group of the copies that this thread started since its last group.
__device__ __forceinline__ void cp_async_commit() {
#if !NEQ_BEFORE_SM_80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most this many of the thread's latest groups are unfinished.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#if !NEQ_BEFORE_SM_80
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// --- matrix fragments ----------------------------------------------------------------------------

// Loads 8 x 8 matrices of 16-bit elements from shared memory, one register each. Lane 8 i + j gives
// the address of row j of matrix i, aligned to 16 bytes; lane l gets elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4. With `trans`, those of column l / 4.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&registers)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a warp's 16 x 8 tile d of float, a 16 x 16 and b 16 x 8 of T. With g = lane / 4 and
// t = lane % 4, the lane holds
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), two neighbours of a row each;
//   b: (2t.., g), (2t + 8.., g), two neighbours of a column each;
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#if NEQ_BEFORE_SM_80
  before_sm_80::multiply<T>(d, a, b);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// --- 16-byte accesses ----------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_16(const void* address) {
  return *static_cast<const uint4*>(address);
}

// Of global memory that this kernel does not write, and that no other thread will want from L1.
__device__ __forceinline__ uint4 load_16_streaming(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void store_16(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

}  // namespace neq::ptx

#endif
