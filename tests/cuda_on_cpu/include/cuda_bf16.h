// __nv_bfloat16 and __nv_bfloat162: storage and conversions. The project's kernels calculate in
// float.
#pragma once

#include "float_conversions.h"
#include "vector_types.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(neq::emu::bfloat16_from_float(value)) {}
  operator float() const { return neq::emu::float_from_bfloat16(bits); }
};

using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = neq::emu::Vector2<__nv_bfloat16>;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
  return {low, high};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {low, high}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 values) { return {values.x, values.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 values) { return {values.x, values.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 values) { return values.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 values) { return values.y; }
inline float __low2float(__nv_bfloat162 values) { return values.x; }
inline float __high2float(__nv_bfloat162 values) { return values.y; }
