// The entry points that `-fsanitize=thread` makes the compiler call before every access. They
// report to the checks of this runtime; no sanitizer is linked.
#include <cstring>

#include "check.h"

using neq::emu::Access;
using neq::emu::check_access;
using neq::emu::check_aligned;

#define NEQ_HOOKS(bytes)                                                        \
  void __tsan_read##bytes(void* address) {                                      \
    check_aligned(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                             \
  void __tsan_write##bytes(void* address) {                                     \
    check_aligned(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }                                                                             \
  void __tsan_unaligned_read##bytes(void* address) {                            \
    check_access(address, bytes, Access::kRead, __builtin_return_address(0));   \
  }                                                                             \
  void __tsan_unaligned_write##bytes(void* address) {                           \
    check_access(address, bytes, Access::kWrite, __builtin_return_address(0));  \
  }                                                                             \
  void __tsan_volatile_read##bytes(void* address) {                             \
    check_aligned(address, bytes, Access::kRead, __builtin_return_address(0));  \
  }                                                                             \
  void __tsan_volatile_write##bytes(void* address) {                            \
    check_aligned(address, bytes, Access::kWrite, __builtin_return_address(0)); \
  }

// Host code only: kernels have CUDA's atomics.
#define NEQ_ATOMIC_HOOKS(bits, Word)                                                               \
  Word __tsan_atomic##bits##_load(const volatile Word* at, int) {                                  \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile Word* at, Word value, int) {                           \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                                \
  Word __tsan_atomic##bits##_exchange(volatile Word* at, Word value, int) {                        \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                       \
  }                                                                                                \
  Word __tsan_atomic##bits##_fetch_add(volatile Word* at, Word value, int) {                       \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                \
  Word __tsan_atomic##bits##_fetch_sub(volatile Word* at, Word value, int) {                       \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Word* at, Word* expected, Word value, \
                                                    int, int) {                                    \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST,               \
                                       __ATOMIC_SEQ_CST);                                          \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile Word* at, Word* expected, Word value,   \
                                                  int, int) {                                      \
    return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_SEQ_CST,                \
                                       __ATOMIC_SEQ_CST);                                          \
  }

#pragma GCC visibility push(hidden)

extern "C" {

NEQ_HOOKS(1)
NEQ_HOOKS(2)
NEQ_HOOKS(4)
NEQ_HOOKS(8)
NEQ_HOOKS(16)

NEQ_ATOMIC_HOOKS(8, unsigned char)
NEQ_ATOMIC_HOOKS(16, unsigned short)
NEQ_ATOMIC_HOOKS(32, unsigned)
NEQ_ATOMIC_HOOKS(64, unsigned long)

void __tsan_read_range(void* address, size_t bytes) {
  check_access(address, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check_access(address, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_update(void** address, void*) {
  check_aligned(address, sizeof(void*), Access::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_read(void** address) {
  check_aligned(address, sizeof(void*), Access::kRead, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

// In instrumented objects these stand for the functions of the C library.
void* neq_emu_memcpy(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Access::kRead, __builtin_return_address(0));
  check_access(to, bytes, Access::kWrite, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
void* neq_emu_memmove(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Access::kRead, __builtin_return_address(0));
  check_access(to, bytes, Access::kWrite, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
void* neq_emu_memset(void* to, int byte, size_t bytes) {
  check_access(to, bytes, Access::kWrite, __builtin_return_address(0));
  return std::memset(to, byte, bytes);
}

}  // extern "C"

#pragma GCC visibility pop
