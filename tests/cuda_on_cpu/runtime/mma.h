// m16n8k16: the tile that the fragments of a warp make.
#pragma once

#include <cstdint>

#include "../include/float_conversions.h"

namespace neq::emu {

// `operands[lane]` is its four registers of a and two of b; `sums[lane]` its part of the tile,
// which the product is added to.
template <float (*to_float)(uint16_t)>
void multiply_tile(const uint32_t (*operands)[8], float (*sums)[4]) {
  constexpr int kM = 16, kK = 16;
  typedef float Row __attribute__((vector_size(32)));
  uint16_t a_bits[kM][kK];
  Row b[kK], d[kM];
  for (int lane = 0; lane < 32; ++lane) {
    const int major = lane / 4, minor = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      __builtin_memcpy(&a_bits[major + i % 2 * 8][minor + i / 2 * 8], &operands[lane][i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      b[minor + i * 8][major] = to_float(static_cast<uint16_t>(operands[lane][4 + i]));
      b[minor + i * 8 + 1][major] = to_float(static_cast<uint16_t>(operands[lane][4 + i] >> 16));
    }
    for (int i = 0; i < 4; ++i) d[major + i / 2 * 8][minor + i % 2] = sums[lane][i];
  }
  for (int m = 0; m < kM; ++m) {
    Row sum = {};
    for (int k = 0; k < kK; ++k) sum += to_float(a_bits[m][k]) * b[k];
    d[m] += sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int major = lane / 4, minor = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) sums[lane][i] = d[major + i / 2 * 8][minor + i % 2];
  }
}

}  // namespace neq::emu
