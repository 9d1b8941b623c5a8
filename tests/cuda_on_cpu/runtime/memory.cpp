// Asynchronous copies, atomics, and accesses of 16 bytes.
#include "../include/ptx_on_cpu.h"
#include "check.h"
#include "error.h"
#include "machine.h"

using namespace neq::emu;

namespace {

constexpr size_t kCopyBytes = 16;

void perform(const Copy& copy) {
  std::memset(copy.to, 0, kCopyBytes);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

void start_copy(void* shared, const void* global, size_t bytes, const void* pc) {
  if constexpr (kChecked) check_copy_start(shared, global, bytes, pc);
  const Copy copy = {shared, global, bytes, thread->group, pc};
  if (settings.copies_at_issue) perform(copy);
  if (kChecked || !settings.copies_at_issue) thread->copies.push_back(copy);
}

template <class T>
T add_atomically(T* address, T value, const void* pc) {
  if constexpr (kChecked) check_aligned(address, sizeof(T), Access::kAtomic, pc);
  const T before = *address;
  *address = before + value;
  return before;
}

}  // namespace

int atomicAdd(int* address, int value) {
  return add_atomically(address, value, __builtin_return_address(0));
}

unsigned atomicAdd(unsigned* address, unsigned value) {
  return add_atomically(address, value, __builtin_return_address(0));
}

float atomicAdd(float* address, float value) {
  return add_atomically(address, value, __builtin_return_address(0));
}

namespace neq::ptx {

unsigned char* dynamic_shared() { return shared_memory; }

void cp_async_up_to_16(void* shared, const void* global, int bytes) {
  start_copy(shared, global, static_cast<size_t>(bytes), __builtin_return_address(0));
}

void cp_async_16(void* shared, const void* global, bool take) {
  start_copy(shared, global, take ? 16 : 0, __builtin_return_address(0));
}

void cp_async_commit() { ++thread->group; }

#ifdef NEQ_EMU_CHECKED

uint4 load_16(const void* address) {
  check_aligned(address, sizeof(uint4), Access::kRead, __builtin_return_address(0));
  return *static_cast<const uint4*>(address);
}

uint4 load_16_streaming(const void* address) {
  check_read_only(address, sizeof(uint4), __builtin_return_address(0));
  return *static_cast<const uint4*>(address);
}

void store_16(void* address, uint4 value) {
  check_aligned(address, sizeof(uint4), Access::kWrite, __builtin_return_address(0));
  *static_cast<uint4*>(address) = value;
}

#endif

}  // namespace neq::ptx

namespace neq::emu {

void copy_async_wait(int groups_left) {
  Thread& t = *thread;
  while (t.first_copy < t.copies.size()) {
    const Copy& copy = t.copies[t.first_copy];
    if (copy.group + groups_left >= t.group) return;
    if (!settings.copies_at_issue) perform(copy);
    if constexpr (kChecked) check_copy_end(copy.to, copy.pc);
    ++t.first_copy;
  }
  t.copies.clear();
  t.first_copy = 0;
}

#ifdef NEQ_EMU_CHECKED
void load_read_only(void* to, const void* from, size_t bytes) {
  check_read_only(from, bytes, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}
#endif

}  // namespace neq::emu
