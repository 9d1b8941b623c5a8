// torch.optim's SGD, Adam and AdamW updates of one stretch of a parameter, operation by operation
// as torch's single-tensor path does them. Included once per instruction set.

#include "kernels.h"

namespace neq::NEQ_ISA {

template <class T>
NEQ_TARGET void sgd(T* __restrict param, const T* __restrict grad, int64_t count,
                    const SgdStep<Compute<T>>& step) {
  using C = Compute<T>;
  const SgdStep<C> s = step;
  for (int64_t i = 0; i < count; ++i) {
    const C p = static_cast<C>(param[i]);
    const C d = s.grad_sign * static_cast<C>(grad[i]) + s.weight_decay * p;
    param[i] = static_cast<T>(p - s.lr * d);
  }
}

template <class T, bool kFirst>
NEQ_TARGET void sgd_momentum(T* __restrict param, const T* __restrict grad, T* __restrict buffer,
                             int64_t count, const SgdStep<Compute<T>>& step) {
  using C = Compute<T>;
  const SgdStep<C> s = step;
  const C nesterov_grad = s.nesterov ? C(1) : C(0), buffer_share = s.nesterov ? s.momentum : C(1);
  for (int64_t i = 0; i < count; ++i) {
    const C p = static_cast<C>(param[i]);
    const C d = s.grad_sign * static_cast<C>(grad[i]) + s.weight_decay * p;
    const C b = kFirst ? d : s.momentum * static_cast<C>(buffer[i]) + s.grad_share * d;
    buffer[i] = static_cast<T>(b);
    param[i] = static_cast<T>(p - s.lr * (nesterov_grad * d + buffer_share * b));
  }
}

template <class T, bool kAmsgrad>
NEQ_TARGET void adam_update(T* __restrict param, const T* __restrict grad, T* __restrict exp_avg,
                            T* __restrict exp_avg_sq, T* __restrict max_exp_avg_sq, int64_t count,
                            const AdamStep<Compute<T>>& step) {
  using C = Compute<T>;
  const AdamStep<C> s = step;
  for (int64_t i = 0; i < count; ++i) {
    const C p = static_cast<C>(param[i]) * s.decay_factor;
    const C g = s.grad_sign * static_cast<C>(grad[i]) + s.weight_decay * p;
    C m = static_cast<C>(exp_avg[i]);
    // As torch.lerp: from the nearer end, so that a share of 1 is the gradient itself.
    const C way = g - m;
    m = s.beta1_rest < C(0.5) ? m + s.beta1_rest * way : g - (1 - s.beta1_rest) * way;
    C v = static_cast<C>(exp_avg_sq[i]) * s.beta2 + s.beta2_rest * g * g;
    exp_avg[i] = static_cast<T>(m);
    exp_avg_sq[i] = static_cast<T>(v);
    if (kAmsgrad) {
      const C before = static_cast<C>(max_exp_avg_sq[i]);
      v = before > v ? before : v;
      max_exp_avg_sq[i] = static_cast<T>(v);
    }
    param[i] = static_cast<T>(p - s.step_size * m / (std::sqrt(v) / s.root_correction + s.eps));
  }
}

template <class T>
NEQ_TARGET void adam(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t count,
                     const AdamStep<Compute<T>>& step) {
  adam_update<T, false>(param, grad, exp_avg, exp_avg_sq, nullptr, count, step);
}

template <class T>
NEQ_TARGET void round_row(const Compute<T>* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace neq::NEQ_ISA
