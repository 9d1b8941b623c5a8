// __half and __half2: storage and conversions. The project's kernels calculate in float.
#pragma once

#include "float_conversions.h"
#include "vector_types.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float value) : bits(neq::emu::half_from_float(value)) {}
  operator float() const { return neq::emu::float_from_half(bits); }
};

using half = __half;
using __half2 = neq::emu::Vector2<__half>;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  value.bits = bits;
  return value;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline __half2 __float22half2_rn(float2 values) { return {values.x, values.y}; }
inline float2 __half22float2(__half2 values) { return {values.x, values.y}; }
inline __half __low2half(__half2 values) { return values.x; }
inline __half __high2half(__half2 values) { return values.y; }
inline float __low2float(__half2 values) { return values.x; }
inline float __high2float(__half2 values) { return values.y; }
