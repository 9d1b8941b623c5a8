// float to and from the 16-bit formats, to the nearest, ties to even. NaN becomes 0x7fff, as CUDA's
// conversions have it.
#pragma once

#include <cstdint>

#if defined(__FLT16_MAX__) && !defined(NEQ_EMU_PORTABLE)
#define NEQ_EMU_FLOAT16  // the compiler has the type; one instruction where the CPU has it
#endif

namespace neq::emu {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline bool is_nan(float value) { return (bits_of(value) & 0x7fffffffu) > 0x7f800000u; }

inline float float_from_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t bfloat16_from_float(float value) {
  if (is_nan(value)) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float_from_half(uint16_t bits) {
#ifdef NEQ_EMU_FLOAT16
  _Float16 value;
  __builtin_memcpy(&value, &bits, 2);
  return static_cast<float>(value);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

inline uint16_t half_from_float(float value) {
  if (is_nan(value)) return 0x7fff;
#ifdef NEQ_EMU_FLOAT16
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &rounded, 2);
  return bits;
#else
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u, magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number: the addition rounds to a multiple of 2^-24.
    const uint32_t shifted = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | shifted);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
#endif
}

}  // namespace neq::emu
