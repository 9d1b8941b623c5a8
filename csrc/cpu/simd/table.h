// The table of one instruction set: the including file defines NEQ_ISA and NEQ_TARGET.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "correlate.h"
#include "correlate_pixels.h"
#include "gather.h"
#include "kernels.h"
#include "outer_product.h"
#include "packing.h"
#include "plane_dots.h"
#include "row_steps.h"

namespace neq::NEQ_ISA {

template <class T>
const Kernels<T>& kernels() {
  using C = Compute<T>;
  static constexpr Kernels<T> table{
      sgd<T>,
      sgd_momentum<T, false>,
      sgd_momentum<T, true>,
      adam<T>,
      adam_update<T, true>,
      correlate<C>,
      correlate_pixels<C>,
      sum<C>,
      copy_rows<T, C>,
      kMostBlended,
      round_row<T>,
  };
  return table;
}

template <class T>
constexpr auto plane_dots_of()
    -> void (*)(const PlaneDots<T, Compute<T>>&, int64_t, int64_t, int64_t) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return plane_dots<T, T>;
  } else {
    return nullptr;
  }
}

template <class T>
const DirectKernels<T>& direct_kernels() {
  using C = Compute<T>;
  static constexpr DirectKernels<T> table{
      kTileLimits,
      outer_product<C>,
      sum_pixels<C>,
      gather_columns<T, C>,
      copy_pixels<T, C, true>,
      copy_pixels<C, C, false>,
      interleave<T, C>,
      take_steps<T>,
      nullptr,
      plane_dots_of<T>(),
      kDotRows,
  };
  return table;
}

template <class Word>
GatherColumns<Word> gather_columns_kernel() {
  return gather_columns<Word, Word>;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();
template const DirectKernels<float>& direct_kernels<float>();
template const DirectKernels<double>& direct_kernels<double>();
template const DirectKernels<BFloat16>& direct_kernels<BFloat16>();
template const DirectKernels<Half>& direct_kernels<Half>();
template GatherColumns<uint16_t> gather_columns_kernel<uint16_t>();
template GatherColumns<uint32_t> gather_columns_kernel<uint32_t>();
template GatherColumns<uint64_t> gather_columns_kernel<uint64_t>();

}  // namespace neq::NEQ_ISA
