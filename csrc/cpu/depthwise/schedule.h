// How the direct depthwise wgrad is shared out among threads: parts of the reduction and vectors of
// channels, or channels, cut into a grid. The kernels run by exactly this, and a test reads it.
#pragma once

#include "../tensor/shares.h"
#include "../tensor/split.h"

namespace neq::depthwise {

// What a share computes at least: 3 to 6 us, as long as it takes to wake a thread and to wait for
// it. On average shares have twice as much.
constexpr int64_t kLeastProducts = 1 << 15;

// So many pieces of work, of a part and a vector each, are enough for any number of threads.
constexpr int64_t kEnoughPieces = 128, kMostParts = 64;

// What sums of its own for a part are worth, where each vector of channels has one of every tap.
constexpr int64_t kLeastPixels = 512;

// The parts of a reduction over `units` with `products` in all; they follow from the shape alone.
inline Split parts_of(int64_t units, int64_t least_units, int64_t vectors, int64_t products) {
  const int64_t wanted = std::min((kEnoughPieces - 1) / vectors + 1, products / kLeastProducts / 2);
  int64_t parts = 1;
  while (parts < std::min(wanted, kMostParts)) parts *= 2;
  return Split(units, parts, least_units);
}

struct Share {
  Range parts, vectors;
};

class Schedule {
 public:
  // `products` of all units of the parts and of all `vectors`, each of which has equally many.
  Schedule(const Split& parts, int64_t vectors, int64_t products, int64_t threads)
      : parts_(parts), vectors_(vectors), products_(products) {
    const int64_t most = worthwhile(threads, products, 2 * kLeastProducts);
    int64_t best = parts.length * vectors;
    for (int64_t a = 1; a <= std::min(most, parts.parts); ++a) {
      const int64_t units = largest_of_parts(a);
      for (int64_t b = std::min(most / a, vectors); b > 0; --b) {
        const int64_t largest = units * ((vectors + b - 1) / b);
        if (static_cast<double>(largest * a * b) > kMostUneven * parts.length * vectors) continue;
        if (largest < best) {
          best = largest;
          of_parts_ = a, of_vectors_ = b;
        }
        break;
      }
    }
  }

  int64_t shares() const { return of_parts_ * of_vectors_; }

  Share share(int64_t i) const {
    return {share_of(parts_.parts, i / of_vectors_, of_parts_),
            share_of(vectors_, i % of_vectors_, of_vectors_)};
  }

  int64_t products(int64_t i) const {
    const Share s = share(i);
    return products_ / (parts_.length * vectors_) * units(s.parts) * s.vectors.size();
  }

 private:
  int64_t units(Range parts) const { return parts_.end(parts.end - 1) - parts_.begin(parts.begin); }

  int64_t largest_of_parts(int64_t shares) const {
    int64_t largest = 0;
    for (int64_t i = 0; i < shares; ++i) {
      largest = std::max(largest, units(share_of(parts_.parts, i, shares)));
    }
    return largest;
  }

  Split parts_;
  int64_t vectors_, products_;
  int64_t of_parts_ = 1, of_vectors_ = 1;
};

}  // namespace neq::depthwise
