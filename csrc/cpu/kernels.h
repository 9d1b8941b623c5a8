// Inner loops, compiled once per instruction set; kernels<T>() is the best set this CPU runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace neq {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Arithmetic of half types is done in float.
template <class T>
using Compute = std::conditional_t<sizeof(T) == 2, float, T>;

template <class C>
struct SgdStep {
  C lr, momentum, grad_share, weight_decay, grad_sign;
  bool nesterov;
};

template <class C>
struct AdamStep {
  C step_size, beta1_rest, beta2, beta2_rest, root_correction, eps, weight_decay, decay_factor,
      grad_sign;
};

template <class T>
struct Kernels {
  using C = Compute<T>;
  void (*sgd)(T* param, const T* grad, int64_t count, const SgdStep<C>& step);
  void (*sgd_momentum)(T* param, const T* grad, T* buffer, int64_t count, const SgdStep<C>& step);
  void (*sgd_first_momentum)(T* param, const T* grad, T* buffer, int64_t count,
                             const SgdStep<C>& step);
  void (*adam)(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t count,
               const AdamStep<C>& step);
  void (*adam_amsgrad)(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq,
                       int64_t count, const AdamStep<C>& step);
  void (*products_of_run)(const T* a, const T* b, int64_t count, double* sums);
  void (*products_of_columns)(const T* a, const T* b, int64_t rows, int64_t stride, int64_t columns,
                              double* ab, double* aa, double* bb);
};

enum class Isa { portable, avx2, avx512 };

// NEQ_KERNELS_CPU_CAPABILITY (default, avx2, avx512) lowers it.
Isa isa();

namespace portable {
template <class T>
const Kernels<T>& kernels();
}
#ifdef __x86_64__
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}
#endif

template <class T>
const Kernels<T>& kernels() {
#ifdef __x86_64__
  if (isa() == Isa::avx512) return avx512::kernels<T>();
  if (isa() == Isa::avx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

}  // namespace neq
