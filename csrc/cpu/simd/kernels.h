// Inner loops, compiled once per instruction set; kernels<T>() is the best set this CPU runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace neq {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Arithmetic of half types is done in float.
template <class T>
using Compute = std::conditional_t<sizeof(T) == 2, float, T>;

// Of bfloat16: an element of a pixel, and in the upper half of the word that of the next pixel.
enum class Pair : uint32_t {};

// Elements as they are multiplied, and what their products are added up in.
template <class P>
constexpr bool kIsPair = std::is_same_v<P, Pair>;
template <class P>
using SumOf = std::conditional_t<kIsPair<P>, float, P>;

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

// One vector load and shuffle: words of a row from column `from` on go to column `to` on.
struct Window {
  int64_t from, to;
  int32_t lanes[8];  // shuffle control, see column_gather.cpp
  int32_t later[8];  // -1 from column `to` on, where the columns together are one vector
};

template <class Word>
constexpr int64_t kWindowLanes = sizeof(Word) == 8 ? 4 : 8;

struct ColumnGather {
  const int64_t* columns;
  int64_t n;
  const Window* windows;  // none: the rows are narrower than a vector
  int64_t n_windows;
  bool one_vector;                // the windows are blended into one vector of 32-bit words
  int64_t soon_first, soon_last;  // columns of the same row to prefetch; none when first > last
  int64_t room;                   // words behind the last row that may be written
  int64_t next;                   // words from the first element of a pair to the second
  int64_t far;                    // words from a row to the one that is fetched meanwhile; 0: none
};

constexpr int64_t kVectorBytes = 32;

// From the element that is read to the one that is fetched, of rows that lie `row` elements apart:
// far enough ahead for the memory to answer.
constexpr int64_t kRowsAhead = 8, kBytesAhead = 4096;
template <class T>
constexpr int64_t far_ahead(int64_t row) {
  constexpr int64_t kElements = kBytesAhead / static_cast<int64_t>(sizeof(T));
  return row == 0 ? 0 : std::max(kRowsAhead, kElements / row) * row;
}

// `rows` x `columns` vectors of dy and of x; vectors of a row lie `step` elements apart in both.
template <class C>
struct Correlation {
  const C* dy;
  int64_t dy_row;
  const C* x;
  int64_t x_row;
  int64_t rows, columns, step;
};

// A tile of taps of a depthwise convolution, whose sums stay in registers together.
constexpr int kMostTapColumns = 7, kMostTapRows = 3;
constexpr int64_t most_tap_rows(int64_t tap_columns) {
  return tap_columns <= 3 ? 3 : tap_columns <= 5 ? 2 : 1;
}

// From a pixel of dY to the next, from what a tap reads of x for it to what it reads for the next,
// from a tap to the next; in elements.
struct PixelSteps {
  int64_t dy_row, dy_column, x_row, x_column, tap_row, tap_column, lanes_row;
};

// lanes[tap row * lanes_row + tap column * vector + lane] += sum over rows and columns of dy * x, a
// vector of channels at each pixel.
template <class C>
using CorrelatePixels = void (*)(const PixelSteps& steps, const C* dy, const C* x, int64_t rows,
                                 int64_t columns, C* lanes);

// Of the outer product: output channels and vectors of input channels whose sums are in registers,
// at most, and vectors of sums in the first cache.
constexpr int kMostRows = 8, kMostInRegisters = 8, kSumsInCache = 128;

// What of it an instruction set's registers hold: output channels, registers of sums, and how many
// vectors of input channels one of them is.
struct TileLimits {
  int rows, sums, vectors_of_register;

  // Vectors of input channels whose sums, for n output channels, are in registers.
  constexpr int widest(int64_t n) const {
    return vectors_of_register * static_cast<int>(std::min<int64_t>(4, sums / n));
  }
  // The same for sums in the first cache.
  constexpr int widest_in_cache(int64_t n) const {
    return static_cast<int>(kSumsInCache / n) / vectors_of_register * vectors_of_register;
  }
};

// Pixels of dy and of x, in three nested loops, and where the sums of each output channel go. A
// pair is two columns: dy_column and x_column lead from a pair to the next.
template <class P>
struct OuterProduct {
  int64_t images, rows, columns;
  const P* dy;
  int64_t dy_image, dy_row, dy_column;
  const P* x;
  int64_t x_image, x_row, x_column;
  SumOf<P>* const* sums;  // of each output channel; the first one meant is element `at`
  int64_t at;
  bool fresh;     // the sums are stored, not added
  bool x_is_new;  // to the caches
};

// Planes of dy, one for each output channel, and neighbouring ones of x, at some pixels of some
// images; the sums as above.
template <class T, class P>
struct PlaneDots {
  int64_t images, pixels;
  const T* const* dy;
  const T* x;
  int64_t dy_image, x_image, x_plane;
  SumOf<P>* const* sums;
  int64_t at;
  bool fresh, x_is_new;
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
  void (*correlate)(const Correlation<C>& c, const int64_t* offsets, int64_t taps, C* sums);
  const CorrelatePixels<C> (&correlate_pixels)[kMostTapColumns][kMostTapRows];
  void (*sum)(const Correlation<C>& c, double* totals);
  void (*copy_rows)(const T* from, int64_t from_row, int64_t stride, C* to, int64_t to_row,
                    int64_t rows, int64_t count);
  int most_blended;  // windows of a gather
  void (*round_row)(const C* from, int64_t count, T* to);
};

// Of the direct wgrad: P is what elements of type T are packed as. A pair's second element lies
// `next` elements behind the first one; pairs begin `apart` pixels from each other: 1, or 2.
template <class T, class P = Compute<T>>
struct DirectKernels {
  TileLimits tile_limits;
  void (*outer_product)(const OuterProduct<P>& o, int64_t n, int64_t vectors, int64_t skip);
  void (*sum_pixels)(const P* from, int64_t n, int64_t count, int64_t apart, double* totals);
  void (*gather)(const ColumnGather& gather, const T* from, int64_t from_stride, P* to,
                 int64_t to_stride, int64_t rows);
  void (*pack_pixels)(const T* from, int64_t stride, int64_t vectors, int64_t count, P* to,
                      int64_t to_stride, int64_t next);
  void (*copy_pixels)(const P* from, int64_t stride, int64_t vectors, int64_t count, P* to,
                      int64_t to_stride, int64_t next);
  void (*interleave)(const T* const* planes, int64_t n, int64_t first, int64_t count, P* to,
                     int64_t width, int64_t next, int64_t apart);
  void (*take_steps)(const T* from, int64_t from_row, int64_t step, T* to, int64_t to_row,
                     int64_t rows, int64_t count);
  void (*pair_up)(P* elements, int64_t count, int64_t next);  // of pairs only
  // None where elements are converted before they are multiplied.
  void (*plane_dots)(const PlaneDots<T, P>& o, int64_t n, int64_t begin, int64_t end);
  int dot_rows;
};

// Of the word's size, whatever its type.
template <class Word>
using GatherColumns = void (*)(const ColumnGather& gather, const Word* from, int64_t from_stride,
                               Word* to, int64_t to_stride, int64_t rows);

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// NEQ_KERNELS_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16) lowers it.
Isa isa();

namespace portable {
template <class T>
const Kernels<T>& kernels();
template <class T>
const DirectKernels<T>& direct_kernels();
template <class Word>
GatherColumns<Word> gather_columns_kernel();
}  // namespace portable
#ifdef __x86_64__
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
template <class T>
const DirectKernels<T>& direct_kernels();
template <class Word>
GatherColumns<Word> gather_columns_kernel();
}  // namespace avx2
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
template <class T>
const DirectKernels<T>& direct_kernels();
template <class Word>
GatherColumns<Word> gather_columns_kernel();
}  // namespace avx512
#endif

// For isa() == Isa::avx512_bf16; nullptr if the compiler cannot make them.
const DirectKernels<BFloat16, Pair>* pair_kernels();

template <class T>
const Kernels<T>& kernels() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512) return avx512::kernels<T>();
  if (isa() == Isa::avx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

template <class T, class P = Compute<T>>
const DirectKernels<T, P>& direct_kernels() {
  if constexpr (kIsPair<P>) {
    return *pair_kernels();
  } else {
#ifdef __x86_64__
    if (isa() >= Isa::avx512) return avx512::direct_kernels<T>();
    if (isa() == Isa::avx2) return avx2::direct_kernels<T>();
#endif
    return portable::direct_kernels<T>();
  }
}

template <class Word>
GatherColumns<Word> gather_columns_kernel() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512) return avx512::gather_columns_kernel<Word>();
  if (isa() == Isa::avx2) return avx2::gather_columns_kernel<Word>();
#endif
  return portable::gather_columns_kernel<Word>();
}

}  // namespace neq
