#include <cstdlib>
#include <string>

#include "../ops.h"
#include "kernels.h"

namespace neq {
namespace {

Isa best_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa chosen_isa() {
  const char* asked = std::getenv("NEQ_KERNELS_CPU_CAPABILITY");
  if (asked == nullptr) return best_isa();
  const std::string name = asked;
  require(name == "default" || name == "avx2" || name == "avx512",
          "NEQ_KERNELS_CPU_CAPABILITY: expected default, avx2 or avx512, got ", name);
  const Isa wanted = name == "default" ? Isa::portable : (name == "avx2" ? Isa::avx2 : Isa::avx512);
  require(wanted <= best_isa(), "NEQ_KERNELS_CPU_CAPABILITY: this CPU has no ", name);
  return wanted;
}

}  // namespace

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

std::string capability() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace neq
