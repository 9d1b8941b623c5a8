// CUDA's short vectors. Copying one is a single access of its whole size, as on the GPU: without
// that the compiler is free to move the members one by one, and four requests would be counted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neq::emu {

// The integer that moves `bytes` at once.
template <size_t bytes>
struct Whole;
template <>
struct Whole<4> {
  typedef uint32_t type __attribute__((may_alias));
};
template <>
struct Whole<8> {
  typedef uint64_t type __attribute__((may_alias));
};
template <>
struct Whole<16> {
  typedef uint32_t type __attribute__((vector_size(16), may_alias));
};

template <size_t bytes>
__attribute__((always_inline)) inline void copy_whole(void* to, const void* from) {
  using Word = typename Whole<bytes>::type;
  *static_cast<Word*>(to) = *static_cast<const Word*>(from);
}

template <class T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;

  Vector2() = default;
  __attribute__((always_inline)) Vector2(T x, T y) : x(x), y(y) {}
  __attribute__((always_inline)) Vector2(const Vector2& other) {
    copy_whole<sizeof(Vector2)>(this, &other);
  }
  __attribute__((always_inline)) Vector2& operator=(const Vector2& other) {
    copy_whole<sizeof(Vector2)>(this, &other);
    return *this;
  }
};

template <class T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;

  Vector4() = default;
  __attribute__((always_inline)) Vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  __attribute__((always_inline)) Vector4(const Vector4& other) {
    copy_whole<sizeof(Vector4)>(this, &other);
  }
  __attribute__((always_inline)) Vector4& operator=(const Vector4& other) {
    copy_whole<sizeof(Vector4)>(this, &other);
    return *this;
  }
};

}  // namespace neq::emu

using float2 = neq::emu::Vector2<float>;
using float4 = neq::emu::Vector4<float>;
using int2 = neq::emu::Vector2<int>;
using int4 = neq::emu::Vector4<int>;
using uint2 = neq::emu::Vector2<unsigned>;
using uint4 = neq::emu::Vector4<unsigned>;

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
