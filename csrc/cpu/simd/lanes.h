// Vectors, and elements as they are multiplied, made of elements as they lie in memory. Included
// once per instruction set.
#pragma once

#ifdef NEQ_PAIRS
#include <immintrin.h>
#endif

#include "kernels.h"

namespace neq::NEQ_ISA {

template <class C>
struct Lanes {
  static constexpr int64_t count = kVectorBytes / sizeof(C);
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<Pair> : Lanes<uint32_t> {};

template <class C>
NEQ_TARGET inline __attribute__((always_inline)) typename Lanes<C>::Vector load(const C* from) {
  typename Lanes<C>::Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Neighbouring elements that one register holds, and those of half of one where it holds two
// vectors.
template <class C, int kBytes>
struct Register {
  static constexpr int64_t count = kBytes / static_cast<int64_t>(sizeof(C));
  typedef C Type __attribute__((vector_size(kBytes)));
};

template <int kBytes>
struct Register<Pair, kBytes> : Register<uint32_t, kBytes> {};

constexpr int kVectorsOfRegister = NEQ_REGISTER_BYTES / kVectorBytes;

// Half types, as the lower halves of words.
template <int kBytes, class T>
NEQ_TARGET inline __attribute__((always_inline)) typename Register<uint32_t, kBytes>::Type
low_halves(const T* from) {
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return __builtin_convertvector(halves, typename Register<uint32_t, kBytes>::Type);
}

// A vector of P; the second elements of pairs lie `next` elements behind the first ones, and these
// `apart` elements from each other: 1, or 2 where pairs are words as they lie in memory.
template <class P, int kBytes = kVectorBytes, class T>
NEQ_TARGET inline __attribute__((always_inline)) typename Register<P, kBytes>::Type load_as_packed(
    const T* from, int64_t next = 0, int64_t apart = 1) {
  using Vector = typename Register<P, kBytes>::Type;
  if constexpr (std::is_same_v<T, P>) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
  } else if constexpr (kIsPair<P>) {
    if (apart == 2) {
      Vector words;
      std::memcpy(&words, from, sizeof(words));
      return words;
    }
    return low_halves<kBytes>(from) | low_halves<kBytes>(from + next) << 16;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<Vector>(low_halves<kBytes>(from) << 16);
  } else {
    static_assert(std::is_same_v<T, Half>);
    using Words = typename Register<uint32_t, kBytes>::Type;
    const Words word = low_halves<kBytes>(from) << 16, sign = word & 0x80000000U,
                magnitude = word + word;
    // The exponent where a float has it; what has none, as the mantissa of a number that has one.
    const Vector normal = reinterpret_cast<Vector>((magnitude >> 4) + (0xE0U << 23)) * 0x1.0p-112F;
    const Vector small = reinterpret_cast<Vector>((magnitude >> 17) | (126U << 23)) - 0.5F;
    const auto is_small = magnitude < (1U << 27);
    return reinterpret_cast<Vector>(
        sign | (is_small ? reinterpret_cast<Words>(small) : reinterpret_cast<Words>(normal)));
  }
}

template <class Vector, class C>
NEQ_TARGET inline __attribute__((always_inline)) Vector load_as(const C* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Read once: the compiler would rather read an operand of every instruction from memory again.
template <class Vector>
NEQ_TARGET inline __attribute__((always_inline)) void keep_in_register(Vector& vector) {
#ifdef NEQ_VECTOR_SHUFFLES
  asm("" : "+v"(vector));
#endif
}

template <class Vector>
NEQ_TARGET inline __attribute__((always_inline)) void multiply_add(Vector& total, const Vector& d,
                                                                   const Vector& pixel) {
  total += d * pixel;
}

#ifdef NEQ_PAIRS
using PairsOfWhole = typename Register<Pair, 64>::Type;
using PairsOfHalf = typename Register<Pair, 32>::Type;

NEQ_TARGET inline __attribute__((always_inline)) void multiply_add(
    typename Register<float, 64>::Type& total, const PairsOfWhole& d, const PairsOfWhole& pixel) {
  total = _mm512_dpbf16_ps(total, __m512bh(d), __m512bh(pixel));
}

NEQ_TARGET inline __attribute__((always_inline)) void multiply_add(
    typename Register<float, 32>::Type& total, const PairsOfHalf& d, const PairsOfHalf& pixel) {
  total = _mm256_dpbf16_ps(total, __m256bh(d), __m256bh(pixel));
}
#endif

template <class P, class T>
inline P packed_element(const T* from, int64_t next = 0) {
  if constexpr (kIsPair<P> && !kIsPair<T>) {
    return Pair{from->x | static_cast<uint32_t>(from[next].x) << 16};
  } else {
    return static_cast<P>(*from);
  }
}

}  // namespace neq::NEQ_ISA
