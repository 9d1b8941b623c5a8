// How the direct wgrad is shared out among threads: parts of the reduction, blocks of dy's channels
// and tiles of x's, cut into a grid. The kernel runs by exactly this, and a test reads it.
#pragma once

#include "../tensor/shares.h"
#include "../tensor/split.h"
#include "direct_operands.h"

namespace neq {

// What a share computes at least: 2 us, as long as it takes to wake a thread and to wait for it.
// On average shares have twice as much.
constexpr int64_t kLeastProducts = 1 << 15;

// What copying an element costs, in products: dy is packed by every chunk of tiles, x is copied, or
// at least read, by every group of blocks that are taken together. Measured.
constexpr int64_t kProductsPerGrad = 32, kProductsPerInput = 8, kProductsPerRead = 2;

// Blocks whose pixels of a unit fit into the second cache.
constexpr int64_t kBlocksTogether = 32, kMostBlocksTogether = 48;

inline int64_t groups_together(int64_t blocks) {
  return blocks <= kMostBlocksTogether ? 1 : divided_up(blocks, kBlocksTogether);
}

struct DirectShare {
  Range parts, blocks, tiles;
};

// Reads the operands, which outlive it; `units` are cut into the parts of the reduction.
template <class T, class P>
class DirectSchedule {
 public:
  DirectSchedule(const Operands<T, P>& o, const ConvProblem& p, const Split& units, int64_t threads)
      : o_(o),
        p_(p),
        units_(units),
        blocks_(static_cast<int64_t>(o.blocks().size())),
        tiles_(static_cast<int64_t>(o.tiles().size())),
        taps_(o.taps_as_channels() ? 1 : p.taps()) {
    const auto products = static_cast<int64_t>(o.products());
    const int64_t most = worthwhile(threads, products, 2 * kLeastProducts);
    if (most > 1) choose(most);
  }

  int64_t shares() const { return of_parts_ * of_blocks_ * of_tiles_; }
  int64_t groups() const { return of_blocks_; }
  bool cuts_rows() const { return of_tiles_ > 1; }
  int64_t group_of(int64_t share) const { return share / of_tiles_ % of_blocks_; }
  Range blocks_of(int64_t group) const { return share_of(blocks_, group, of_blocks_); }

  DirectShare share(int64_t i) const {
    const int64_t tile = i % of_tiles_;
    return {share_of(units_.parts, i / of_tiles_ / of_blocks_, of_parts_),
            blocks_of(group_of(i)),
            {first_tile(tile, of_tiles_), first_tile(tile + 1, of_tiles_)}};
  }

  // The input channels of a share.
  Range lanes_of(int64_t i) const {
    const int64_t tile = i % of_tiles_;
    return {lanes_before(tile, of_tiles_), lanes_before(tile + 1, of_tiles_)};
  }

  int64_t products(int64_t i) const {
    const int64_t part = i / of_tiles_ / of_blocks_, group = group_of(i);
    return (pixels_before(part + 1, of_parts_) - pixels_before(part, of_parts_)) *
           (channels_before(group + 1, of_blocks_) - channels_before(group, of_blocks_)) *
           lanes_of(i).size() * taps_;
  }

 private:
  // What lies before share i of so many.
  int64_t pixels_before(int64_t i, int64_t shares) const {
    if (i == shares) return p_.outputs();
    const Unit unit = o_.unit_at(units_.begin(share_of(units_.parts, i, shares).begin));
    return (unit.image * p_.h.output + unit.top) * p_.w.output;
  }

  int64_t channels_before(int64_t i, int64_t shares) const {
    return i == shares ? p_.n : o_.blocks()[share_of(blocks_, i, shares).begin].first;
  }

  int64_t lanes_before(int64_t i, int64_t shares) const {
    const int64_t tile = first_tile(i, shares);
    return tile == tiles_ ? o_.padded() : o_.tiles()[tile].first;
  }

  // Shares begin where a line does. A tile that leaves lanes out stays with the one before.
  int64_t first_tile(int64_t i, int64_t shares) const {
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(P));
    int64_t tile = share_of(tiles_, i, shares).begin;
    if (i == 0) return 0;
    while (tile < tiles_ && (o_.tiles()[tile].skip > 0 || o_.tiles()[tile].first % kLine != 0)) {
      ++tile;
    }
    return tile;
  }

  // The grid whose largest share is done first.
  void choose(int64_t threads) {
    const auto pixels_of = [&](int64_t i, int64_t n) { return pixels_before(i, n); };
    const auto channels_of = [&](int64_t i, int64_t n) { return channels_before(i, n); };
    const auto lanes_of = [&](int64_t i, int64_t n) { return lanes_before(i, n); };
    const double all = static_cast<double>(p_.outputs()) * static_cast<double>(p_.n) *
                       static_cast<double>(o_.padded());
    double best = cost(p_.outputs(), p_.n, o_.padded(), 1);
    for (int64_t n_parts = 1; n_parts <= std::min(threads, units_.parts); ++n_parts) {
      if (!is_worth_a_share_more(n_parts, units_.parts)) continue;
      const Extent pixels = extent_of(n_parts, pixels_of);
      for (int64_t n_blocks = 1; n_blocks <= std::min(threads / n_parts, blocks_); ++n_blocks) {
        if (!is_worth_a_share_more(n_blocks, blocks_)) continue;
        const Extent channels = extent_of(n_blocks, channels_of);
        for (int64_t n_tiles = std::min(threads / n_parts / n_blocks, tiles_); n_tiles > 0;
             --n_tiles) {
          const Extent lanes = extent_of(n_tiles, lanes_of);
          const double largest = static_cast<double>(pixels.largest) *
                                 static_cast<double>(channels.largest * lanes.largest);
          const double smallest = static_cast<double>(pixels.smallest) *
                                  static_cast<double>(channels.smallest * lanes.smallest);
          const auto n = static_cast<double>(n_parts * n_blocks * n_tiles);
          if (n * largest > kMostUneven * all) continue;
          const double time = cost(pixels.largest, channels.largest, lanes.largest, n_blocks);
          if (smallest * static_cast<double>(taps_) >= kLeastProducts && time < best) {
            best = time;
            of_parts_ = n_parts, of_blocks_ = n_blocks, of_tiles_ = n_tiles;
          }
          break;
        }
      }
    }
  }

  double cost(int64_t pixels, int64_t channels, int64_t lanes, int64_t n_blocks) const {
    const int64_t copies = groups_together(divided_up(blocks_, n_blocks));
    const int64_t input_cost = o_.reads_in_place() ? kProductsPerRead : kProductsPerInput;
    const int64_t of_a_pixel =
        channels * lanes * taps_ + kProductsPerGrad * channels + input_cost * copies * lanes;
    return static_cast<double>(pixels) * static_cast<double>(of_a_pixel);
  }

  const Operands<T, P>& o_;
  const ConvProblem& p_;
  Split units_;
  int64_t blocks_, tiles_, taps_;
  int64_t of_parts_ = 1, of_blocks_ = 1, of_tiles_ = 1;
};

}  // namespace neq
