#include "fiber.h"

#include <sys/mman.h>

#include <vector>

namespace neq::emu {

#ifdef NEQ_EMU_OWN_SWITCH

extern "C" __attribute__((visibility("hidden"))) void neq_emu_switch(void** save, void* load);

// The registers that the calling convention makes the callee keep.
asm(R"(
.text
.hidden neq_emu_switch
.globl neq_emu_switch
.type neq_emu_switch, @function
neq_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size neq_emu_switch, .-neq_emu_switch
)");

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  neq_emu_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#endif

char* stack_of(unsigned number) {
  static std::vector<char*> stacks;
  constexpr size_t kGuardBytes = 64 * 1024;
  while (stacks.size() <= number) {
    // Stacks at equal distances would share the same few sets of the cache.
    const size_t shift = stacks.size() % 32 * 1088;
    char* memory =
        static_cast<char*>(mmap(nullptr, 2 * kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks.push_back(memory + kGuardBytes + shift);
  }
  return stacks[number];
}

}  // namespace neq::emu
