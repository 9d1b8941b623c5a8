// The inner loops of the direct wgrad. Included once per instruction set.

#include "kernels.h"
#include "lanes.h"

namespace neq::NEQ_ISA {

// The first elements of some pairs, beside zeros.
NEQ_TARGET inline const Pair* without_partners(const Pair* from, int64_t count, Pair* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = Pair{static_cast<uint32_t>(from[i]) & 0xFFFFU};
  return to;
}

// As a number that vectors are made of.
template <class P>
inline auto element(P packed) {
  if constexpr (kIsPair<P>) {
    return static_cast<uint32_t>(packed);
  } else {
    return packed;
  }
}

constexpr bool kKeepsPixels = NEQ_REGISTER_BYTES == 64;  // with 16 registers there is no room
// Registers of sums: with the operands they fill all.
constexpr int kMostSums = NEQ_REGISTER_BYTES == 64 ? 24 : 12;
constexpr TileLimits kTileLimits{NEQ_REGISTER_BYTES == 64 ? 8 : 6, kMostSums, kVectorsOfRegister};

// Lane by lane: the ones left out may be another thread's.
template <class Vector, class C>
NEQ_TARGET inline __attribute__((always_inline)) void store_lanes(const Vector& vector,
                                                                  int64_t skip, C* to) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(C);
#pragma GCC unroll 8
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (lane >= skip) to[lane] = vector[lane];
  }
}

// How many sums of each result are in registers, each of every so manieth pixel: a multiplication
// waits for the one before of the same sum, and so many others are done meanwhile.
constexpr int kSumsAtOnce = 8, kMostChains = 4;
constexpr int number_of_chains(int sums) { return std::clamp(kSumsAtOnce / sums, 1, kMostChains); }

// The sums of kRows output channels and kVectors vectors of input channels.
template <class P, int kRows, int kVectors>
struct TileSums {
  using C = SumOf<P>;
  using Whole = Register<C, NEQ_REGISTER_BYTES>;
  using Half = Register<C, kVectorBytes>;
  using Vector = typename Whole::Type;
  using HalfVector = typename Half::Type;
  using Packed = typename Register<P, NEQ_REGISTER_BYTES>::Type;
  using HalfPacked = typename Register<P, kVectorBytes>::Type;
  static constexpr int kWhole = kVectors / kVectorsOfRegister, kMost = std::max(kWhole, 1);
  static constexpr bool kHasHalf = kVectors % kVectorsOfRegister != 0;
  static constexpr int kRegisters = kRows * (kWhole + kHasHalf);

  Vector total[kRows][kMost];
  HalfVector half_total[kRows];

  NEQ_TARGET inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      half_total[k] = HalfVector{};
#pragma GCC unroll 8
      for (int v = 0; v < kMost; ++v) total[k][v] = Vector{};
    }
  }

  NEQ_TARGET inline __attribute__((always_inline)) void add(const TileSums& other) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      if constexpr (kHasHalf) half_total[k] += other.half_total[k];
#pragma GCC unroll 8
      for (int v = 0; v < kWhole; ++v) total[k][v] += other.total[k][v];
    }
  }

  // Of x, what lies `far` ahead is fetched, if it is new.
  NEQ_TARGET inline __attribute__((always_inline)) void add_pixel(const P* dy, const P* x,
                                                                  bool is_new, int64_t far) {
    if (is_new) {
      constexpr int64_t kLine = 64 / sizeof(P);
#pragma GCC unroll 8
      for (int64_t c = 0; c < kVectors * Half::count; c += kLine) __builtin_prefetch(x + far + c);
    }
    Packed pixel[kMost];
    HalfPacked half_pixel;
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) {
      pixel[v] = load_as<Packed>(x + v * Whole::count);
      if constexpr (kRows > 1 && kKeepsPixels) keep_in_register(pixel[v]);
    }
    if constexpr (kHasHalf) half_pixel = load_as<HalfPacked>(x + kWhole * Whole::count);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      // Minus, not plus: x - 0 is x whatever its sign, and costs no instruction.
      const Packed d = element(dy[k]) - Packed{};
#pragma GCC unroll 8
      for (int v = 0; v < kWhole; ++v) multiply_add(total[k][v], d, pixel[v]);
      if constexpr (kHasHalf) {
        multiply_add(half_total[k], element(dy[k]) - HalfPacked{}, half_pixel);
      }
    }
  }
};

template <class P, int kRows, int kVectors>
NEQ_TARGET void outer_product_tile(const OuterProduct<P>& o, int64_t first, int64_t skip) {
  using Sums = TileSums<P, kRows, kVectors>;
  using C = typename Sums::C;
  using Whole = typename Sums::Whole;
  using Half = typename Sums::Half;
  constexpr int kWhole = Sums::kWhole, kChains = number_of_chains(Sums::kRegisters);
  constexpr int64_t kPixels = kIsPair<P> ? 2 : 1;
  const bool fresh = o.fresh;
  const int64_t far = far_ahead<P>(o.x_column);
  C* sums[kRows];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    sums[k] = o.sums[first + k] + o.at;
    __builtin_prefetch(sums[k], 1);
  }
  [[maybe_unused]] P last_dy[kRows], last_x[kVectors * Half::count];
  Sums chains[kChains];
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) chains[i].clear();
  for (int64_t image = 0; image < o.images; ++image) {
    for (int64_t row = 0; row < o.rows; ++row) {
      const P* dy = o.dy + image * o.dy_image + row * o.dy_row + first;
      const P* x = o.x + image * o.x_image + row * o.x_row;
      int64_t column = 0;
      if constexpr (kChains > 1) {
        for (; column + kChains * kPixels <= o.columns; column += kChains * kPixels) {
#pragma GCC unroll 8
          for (int i = 0; i < kChains; ++i) {
            chains[i].add_pixel(dy, x, o.x_is_new, far);
            dy += o.dy_column;
            x += o.x_column;
          }
        }
      }
      for (; column < o.columns; column += kPixels) {
        if constexpr (kIsPair<P>) {
          if (column + 1 == o.columns) {
            dy = without_partners(dy, kRows, last_dy);
            x = without_partners(x, kVectors * Half::count, last_x);
          }
        }
        chains[0].add_pixel(dy, x, o.x_is_new, far);
        dy += o.dy_column;
        x += o.x_column;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 1; i < kChains; ++i) chains[0].add(chains[i]);
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kWhole; ++v) {
      C* to = sums[k] + v * Whole::count;
      auto sum = chains[0].total[k][v];
      if (!fresh) sum += load_as<typename Sums::Vector>(to);
      if constexpr (kVectors == 1) {
        if (skip > 0) {
          store_lanes(sum, skip, to);
          continue;
        }
      }
      std::memcpy(to, &sum, sizeof(sum));
    }
    if constexpr (Sums::kHasHalf) {
      C* to = sums[k] + kWhole * Whole::count;
      auto sum = chains[0].half_total[k];
      if (!fresh) sum += load_as<typename Sums::HalfVector>(to);
      if constexpr (kVectors == 1) {
        if (skip > 0) {
          store_lanes(sum, skip, to);
          continue;
        }
      }
      std::memcpy(to, &sum, sizeof(sum));
    }
  }
}

// sums[k] += dy[k] * x over kPixels pixels: dy is in registers and the sums are in the first cache,
// so x is read in long stretches, which the CPU foresees.
template <class C, int kRows, int kPixels>
NEQ_TARGET inline void add_pixels(const C* dy, int64_t dy_column, const C* x, int64_t x_column,
                                  int64_t far, int64_t vectors,
                                  C (*sums)[kSumsInCache / kRows * Lanes<C>::count]) {
  using Whole = Register<C, NEQ_REGISTER_BYTES>;
  using Half = Register<C, kVectorBytes>;
  using Vector = typename Whole::Type;
  using HalfVector = typename Half::Type;
  Vector d[kPixels][kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) d[i][k] = dy[i * dy_column + k] - Vector{};
  }
  const int64_t whole = vectors / kVectorsOfRegister;
  for (int64_t v = 0; v < whole; ++v) {
    Vector pixel[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      pixel[i] = load_as<Vector>(x + i * x_column + v * Whole::count);
      __builtin_prefetch(x + i * x_column + v * Whole::count + far);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      Vector total = load_as<Vector>(sums[k] + v * Whole::count);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) total += d[i][k] * pixel[i];
      std::memcpy(sums[k] + v * Whole::count, &total, sizeof(total));
    }
  }
  if constexpr (kVectorsOfRegister > 1) {
    if (vectors % kVectorsOfRegister == 0) return;
    const int64_t at = whole * Whole::count;
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      HalfVector total = load_as<HalfVector>(sums[k] + at);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) {
        total +=
            (dy[i * dy_column + k] - HalfVector{}) * load_as<HalfVector>(x + i * x_column + at);
      }
      std::memcpy(sums[k] + at, &total, sizeof(total));
    }
  }
}

// How many pixels of dy, for so many rows, the registers hold beside x.
constexpr int pixels_in_registers(int rows) {
  if (NEQ_REGISTER_BYTES == 64) return std::min(8, 24 / rows);
  return rows <= 2 ? 4 : rows <= 4 ? 3 : 2;
}

template <class C, int kRows>
NEQ_TARGET void outer_product_wide(const OuterProduct<C>& o, int64_t vectors) {
  using Vector = typename Lanes<C>::Vector;
  constexpr int64_t kLanes = Lanes<C>::count;
  constexpr int kPixels = pixels_in_registers(kRows);
  const int64_t far = far_ahead<C>(o.x_column);
  alignas(64) C sums[kRows][kSumsInCache / kRows * kLanes];
  for (int k = 0; k < kRows; ++k) std::memset(sums[k], 0, vectors * sizeof(Vector));
  for (int64_t image = 0; image < o.images; ++image) {
    for (int64_t row = 0; row < o.rows; ++row) {
      const C* dy = o.dy + image * o.dy_image + row * o.dy_row;
      const C* x = o.x + image * o.x_image + row * o.x_row;
      int64_t column = 0;
      for (; column + kPixels <= o.columns; column += kPixels) {
        add_pixels<C, kRows, kPixels>(dy, o.dy_column, x, o.x_column, far, vectors, sums);
        dy += kPixels * o.dy_column;
        x += kPixels * o.x_column;
      }
      for (; column < o.columns; ++column) {
        add_pixels<C, kRows, 1>(dy, o.dy_column, x, o.x_column, far, vectors, sums);
        dy += o.dy_column;
        x += o.x_column;
      }
    }
  }
  for (int k = 0; k < kRows; ++k) {
    C* to = o.sums[k] + o.at;
    for (int64_t v = 0; v < vectors; ++v) {
      Vector sum = load(sums[k] + v * kLanes);
      if (!o.fresh) sum += load(to + v * kLanes);
      std::memcpy(to + v * kLanes, &sum, sizeof(sum));
    }
  }
}

// For the n rows from `first` on, at most kRows; of x kVectors vectors, or, where that is 0,
// `vectors`, with the sums in the first cache.
template <class P, int kVectors, int kRows>
NEQ_TARGET void outer_product_rows(const OuterProduct<P>& o, int64_t first, int64_t n,
                                   int64_t vectors, int64_t skip) {
  if constexpr (kRows > 0) {
    if (n != kRows) return outer_product_rows<P, kVectors, kRows - 1>(o, first, n, vectors, skip);
    if constexpr (kVectors > 0) {
      outer_product_tile<P, kRows, kVectors>(o, first, skip);
    } else {
      outer_product_wide<P, kRows>(o, vectors);
    }
  }
}

// Of up to kVectors vectors; as many rows at a time as there are registers for.
template <class P, int kVectors>
NEQ_TARGET void outer_product_of_width(const OuterProduct<P>& o, int64_t n, int64_t vectors,
                                       int64_t skip) {
  if constexpr (kVectors > 0) {
    if (vectors != kVectors) return outer_product_of_width<P, kVectors - 1>(o, n, vectors, skip);
    constexpr int kRegisters = (kVectors - 1) / kVectorsOfRegister + 1;
    constexpr int kMost = std::min<int>(kTileLimits.rows, kMostSums / kRegisters);
    int64_t first = 0;
    for (int64_t parts = (n + kMost - 1) / kMost; parts > 0; --parts) {
      const int64_t size = (n - first + parts - 1) / parts;
      outer_product_rows<P, kVectors, kMost>(o, first, size, vectors, skip);
      first += size;
    }
  }
}

// sums[k][at + c] += sum over the pixels of dy[k] * x[c], for k < n and c < `vectors` vectors; the
// first `skip` lanes, of a single vector, are left out.
template <class P>
NEQ_TARGET void outer_product(const OuterProduct<P>& o, int64_t n, int64_t vectors, int64_t skip) {
  constexpr int kMost = kTileLimits.widest(1);
  if constexpr (!kIsPair<P>) {
    if (vectors > kMost) return outer_product_rows<P, 0, kTileLimits.rows>(o, 0, n, vectors, skip);
  }
  outer_product_of_width<P, kMost>(o, n, vectors, skip);
}

// Of a pair, that of its first element, or of its second one.
template <class P>
inline double value(P packed, bool second = false) {
  if constexpr (kIsPair<P>) {
    const uint32_t word = (static_cast<uint32_t>(packed) << (second ? 0 : 16)) & 0xFFFF0000U;
    float number;
    std::memcpy(&number, &word, sizeof(number));
    return static_cast<double>(number);
  } else {
    return static_cast<double>(packed);
  }
}

// totals[k] += sum over `count` pixels of from[pixel * n + k]; n is at most 8. Where pairs begin
// two pixels apart, odd pixels are their second elements. Up to 7 elements behind the last one are
// read.
template <class P>
NEQ_TARGET void sum_pixels(const P* from, int64_t n, int64_t count, int64_t apart, double* totals) {
  double even[8] = {}, odd[8] = {};
  const bool second = kIsPair<P> && apart == 2;
  const int64_t to_odd = second ? 0 : n;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2, from += n + to_odd) {
#pragma omp simd
    for (int64_t k = 0; k < 8; ++k) even[k] += value(from[k]);
#pragma omp simd
    for (int64_t k = 0; k < 8; ++k) odd[k] += value(from[to_odd + k], second);
  }
  for (int64_t k = 0; k < n; ++k) {
    totals[k] += even[k] + odd[k] + (i < count ? value(from[k]) : 0.0);
  }
}

}  // namespace neq::NEQ_ISA
