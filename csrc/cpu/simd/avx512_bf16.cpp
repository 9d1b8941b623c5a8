// bfloat16, multiplied in pairs.
#include "kernels.h"

#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define NEQ_KNOWS_AVX512_BF16
#endif

#if defined(__x86_64__) && defined(NEQ_KNOWS_AVX512_BF16)
#define NEQ_ISA avx512_bf16
#define NEQ_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define NEQ_REGISTER_BYTES 64
#define NEQ_VECTOR_SHUFFLES
#define NEQ_PAIRS
#include <cstring>

#include "correlate.h"
#include "gather.h"
#include "outer_product.h"
#include "packing.h"
#include "plane_dots.h"

namespace neq {

const DirectKernels<BFloat16, Pair>* pair_kernels() {
  using namespace avx512_bf16;
  static constexpr DirectKernels<BFloat16, Pair> table{
      kTileLimits,
      outer_product<Pair>,
      sum_pixels<Pair>,
      gather_columns<BFloat16, Pair>,
      copy_pixels<BFloat16, Pair, true>,
      copy_pixels<Pair, Pair, false>,
      interleave<BFloat16, Pair>,
      take_steps<BFloat16>,
      pair_up,
      plane_dots<BFloat16, Pair>,
      kDotRows,
  };
  return &table;
}

}  // namespace neq
#else
namespace neq {
const DirectKernels<BFloat16, Pair>* pair_kernels() { return nullptr; }
}  // namespace neq
#endif
