// Where the pixels of a channel lie side by side and have a single tap, a wgrad is dot products of
// planes: they are multiplied where they lie.
#pragma once

#include "../simd/kernels.h"
#include "convolution.h"
#include "direct_tiles.h"
#include "direct_units.h"

namespace neq {

// Planes have to be long enough to fill registers. With more blocks copies are used so often that
// they are quicker; not of pairs, which are multiplied as they lie in memory.
constexpr int64_t kLeastBytesOfPlane = 128, kMostDotBlocks = 5;
constexpr int64_t kBytesOfPlane = 2048;  // of a unit

template <class T, class P>
class Planes {
 public:
  using C = Compute<T>;

  Planes(const ConvProblem& p, const T* grad, const T* input)
      : p_(p), grad_(grad), input_(input), k_(direct_kernels<T, P>()) {}

  // Of a problem whose pixels were put into one row where they could be.
  static bool serve(const ConvProblem& p, bool channels_last) {
    const DirectKernels<T, P>& k = direct_kernels<T, P>();
    const bool is_flat = p.taps() == 1 && p.h.input == p.h.output && p.h.padding == 0 &&
                         p.w.input == 1 && p.w.padding == 0;
    return !channels_last && k.plane_dots && is_flat &&
           p.input_channels * static_cast<int64_t>(sizeof(P)) >= kVectorBytes &&
           p.h.output * static_cast<int64_t>(sizeof(T)) >= kLeastBytesOfPlane &&
           (kIsPair<P> || p.n <= kMostDotBlocks * k.dot_rows);
  }

  // Adds one unit to targets[n][channel], for one block and the channels of one tile.
  void add(const Unit& unit, const Block& block, const Tile& tile, C* const* targets, bool fresh,
           bool x_is_new) const {
    const int64_t plane = p_.h.output, lanes = kVectorBytes / static_cast<int64_t>(sizeof(P));
    const T* dy[kMostRows];
    for (int64_t k = 0; k < block.size; ++k) dy[k] = grad(unit, p_.active[block.first + k]);
    const T* x = input_ + (unit.image * p_.input_channels + tile.first) * plane + unit.top;
    const PlaneDots<T, P> o{unit.images,
                            unit.bottom - unit.top,
                            dy,
                            x,
                            p_.output_channels * plane,
                            p_.input_channels * plane,
                            plane,
                            targets + block.first,
                            tile.first,
                            fresh,
                            x_is_new};
    k_.plane_dots(o, block.size, tile.skip, tile.vectors * lanes);
  }

  void add_bias(const Unit& unit, const Block& block, double* bias) const {
    for (int64_t i = block.first; i < block.first + block.size; ++i) {
      const T* plane = grad(unit, p_.active[i]);
      for (int64_t image = 0; image < unit.images; ++image) {
        double sum = 0;
        for (int64_t at = 0; at < unit.bottom - unit.top; ++at) {
          sum += static_cast<double>(static_cast<C>(plane[at]));
        }
        bias[i] += sum;
        plane += p_.output_channels * p_.h.output;
      }
    }
  }

 private:
  // A channel of a unit's first image, from its first pixel on.
  const T* grad(const Unit& unit, int64_t channel) const {
    return grad_ + (unit.image * p_.output_channels + channel) * p_.h.output + unit.top;
  }

  const ConvProblem& p_;
  const T *grad_, *input_;
  const DirectKernels<T, P>& k_;
};

}  // namespace neq
