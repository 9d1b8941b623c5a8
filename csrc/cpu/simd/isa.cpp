#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

#include "../ops.h"
#include "kernels.h"

namespace neq {
namespace {

#ifdef __x86_64__
// Not every compiler knows the flag's name.
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif

Isa best_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return has_avx512_bf16() && pair_kernels() != nullptr ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "default";
  }
}

Isa chosen_isa() {
  const char* asked = std::getenv("NEQ_KERNELS_CPU_CAPABILITY");
  if (asked == nullptr) return best_isa();
  const std::string name = asked;
  for (const Isa wanted : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (name != name_of(wanted)) continue;
    require(wanted <= best_isa(), "NEQ_KERNELS_CPU_CAPABILITY: this CPU has no ", name);
    return wanted;
  }
  require(false, "NEQ_KERNELS_CPU_CAPABILITY: expected default, avx2, avx512 or avx512_bf16, got ",
          name);
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

std::string capability() { return name_of(isa()); }

}  // namespace neq
