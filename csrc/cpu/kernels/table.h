// The table of one instruction set: the including file defines NEQ_ISA and NEQ_TARGET.
#include <cmath>
#include <cstdint>

#include "../kernels.h"
#include "row_steps.h"
#include "similarity.h"

namespace neq::NEQ_ISA {

template <class T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> table{
      sgd<T>,
      sgd_momentum<T, false>,
      sgd_momentum<T, true>,
      adam<T>,
      adam_update<T, true>,
      products_of_run<T>,
      products_of_columns<T>,
  };
  return table;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

}  // namespace neq::NEQ_ISA
