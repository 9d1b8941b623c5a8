// Switching between call stacks of one operating system thread. x86-64 has its own few
// instructions; anything else, or NEQ_EMU_PORTABLE, uses ucontext.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(NEQ_EMU_PORTABLE)
#define NEQ_EMU_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace neq::emu {

struct Context {
#ifdef NEQ_EMU_OWN_SWITCH
  void* stack_pointer;
#else
  ucontext_t registers;
#endif
};

// Makes `context` start `entry` on this stack. `entry` never returns.
void prepare(Context& context, char* stack, size_t bytes, void (*entry)());

// Leaves `from`, until something switches back to it.
void switch_context(Context& from, Context& to);

// The stack of the thread with this number, `kStackBytes` above an unmapped page, kept for the
// whole process.
constexpr size_t kStackBytes = 128 * 1024;
char* stack_of(unsigned number);

}  // namespace neq::emu
