// Stands in the place of `#include "launchers.h"` in wgrad.cpp where the emulator counts what
// kernels move: it tells the emulator of the memory that the operators allocate. What has a dtype
// of its own are sums in parts.
#include "launchers.h"

extern "C" {
void neq_emu_add_region(const char* name, const void* base, uint64_t bytes, uint64_t item_bytes,
                        int writable);
// For tests.cuda_on_cpu.emulator.Run.call, which returns the launches since the call before.
int neq_counted_nothing() { return 0; }
}

namespace torch::stable {

inline Tensor counted(const Tensor& made, bool is_sums = false) {
  static int number = 0;
  const std::string name = (is_sums ? "sums " : "allocated ") + std::to_string(number++);
  const auto item = static_cast<uint64_t>(made.element_size());
  if (made.numel() > 0) {
    neq_emu_add_region(name.c_str(), made.const_data_ptr(), made.numel() * item, item, 1);
  }
  return made;
}

inline Tensor counted_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                                std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  return counted(new_empty(like, size, dtype), dtype.has_value());
}

inline Tensor counted_empty_like(const Tensor& like) { return counted(empty_like(like)); }

}  // namespace torch::stable

#define new_empty counted_new_empty
#define empty_like counted_empty_like
