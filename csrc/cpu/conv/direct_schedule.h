// How the direct wgrad is shared out among threads: parts of the reduction, blocks of dy's channels
// and tiles of x's, cut into a grid. The kernel runs by exactly this, and a test reads it.
#pragma once

#include <vector>

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

class DirectSchedule {
 public:
  // `units` are cut into the parts of the reduction.
  template <class T>
  DirectSchedule(const Operands<T>& o, const ConvProblem& p, const Split& units, int64_t threads)
      : all_{{0, units.parts},
             {0, static_cast<int64_t>(o.blocks().size())},
             {0, static_cast<int64_t>(o.tiles().size())}},
        products_(static_cast<int64_t>(o.products())) {
    const int64_t most = worthwhile(threads, products_, 2 * kLeastProducts);
    if (most == 1) return;
    parts_ = pixels_before(o, p, units);
    blocks_ = channels_before(o);
    find_tiles(o, kLineBytes / static_cast<int64_t>(sizeof(T)));
    taps_ = o.taps_as_channels() ? 1 : p.taps();
    input_cost_ = o.reads_in_place() ? kProductsPerRead : kProductsPerInput;
    choose(most);
  }

  int64_t shares() const { return of_parts_ * of_blocks_ * of_tiles_; }
  int64_t groups() const { return of_blocks_; }
  bool cuts_rows() const { return of_tiles_ > 1; }
  int64_t group_of(int64_t share) const { return share / of_tiles_ % of_blocks_; }

  Range blocks_of(int64_t group) const {
    return of_blocks_ == 1 ? all_.blocks : blocks_.share(group, of_blocks_);
  }

  DirectShare share(int64_t i) const {
    if (shares() == 1) return all_;
    const Range tiles = tiles_.share(i % of_tiles_, of_tiles_);
    return {parts_.share(i / of_tiles_ / of_blocks_, of_parts_),
            blocks_of(group_of(i)),
            {first_tile_[tiles.begin], first_tile_[tiles.end]}};
  }

  // The input channels of a share, of `padded` in all.
  Range lanes_of(int64_t i, int64_t padded) const {
    if (of_tiles_ == 1) return {0, padded};
    const Range tiles = tiles_.share(i % of_tiles_, of_tiles_);
    return {tiles_.work({0, tiles.begin}), tiles_.work({0, tiles.end})};
  }

  int64_t products(int64_t i) const {
    if (shares() == 1) return products_;
    return parts_.work(parts_.share(i / of_tiles_ / of_blocks_, of_parts_)) *
           blocks_.work(blocks_of(group_of(i))) *
           tiles_.work(tiles_.share(i % of_tiles_, of_tiles_)) * taps_;
  }

 private:
  template <class T>
  static Cuts pixels_before(const Operands<T>& o, const ConvProblem& p, const Split& units) {
    std::vector<int64_t> before;
    for (int64_t part = 0; part < units.parts; ++part) {
      const Unit unit = o.unit_at(units.begin(part));
      before.push_back((unit.image * p.h.output + unit.top) * p.w.output);
    }
    before.push_back(p.images * p.h.output * p.w.output);
    return Cuts(std::move(before));
  }

  template <class T>
  static Cuts channels_before(const Operands<T>& o) {
    std::vector<int64_t> before;
    for (const Block& block : o.blocks()) before.push_back(block.first);
    before.push_back(o.blocks().back().first + o.blocks().back().size);
    return Cuts(std::move(before));
  }

  // Shares begin where a line does. A tile that leaves lanes out stays with the one before.
  template <class T>
  void find_tiles(const Operands<T>& o, int64_t line) {
    std::vector<int64_t> before;
    for (size_t t = 0; t < o.tiles().size(); ++t) {
      const Tile& tile = o.tiles()[t];
      if (t > 0 && (tile.skip > 0 || tile.first % line != 0)) continue;
      before.push_back(tile.first);
      first_tile_.push_back(static_cast<int64_t>(t));
    }
    before.push_back(o.padded());
    first_tile_.push_back(static_cast<int64_t>(o.tiles().size()));
    tiles_ = Cuts(std::move(before));
  }

  // The grid whose largest share is done first.
  void choose(int64_t threads) {
    if (threads == 1) return;
    const double all = static_cast<double>(parts_.total()) * static_cast<double>(blocks_.total()) *
                       static_cast<double>(tiles_.total());
    double best = cost({parts_.total(), 0}, {blocks_.total(), 0}, {tiles_.total(), 0}, 1);
    std::vector<Cuts::Extent> of_tiles(threads + 1, {0, 0});
    for (const int64_t n_parts : parts_.numbers(threads)) {
      const Cuts::Extent pixels = parts_.extent(n_parts);
      for (const int64_t n_blocks : blocks_.numbers(threads / n_parts)) {
        const Cuts::Extent channels = blocks_.extent(n_blocks);
        const int64_t left = threads / n_parts / n_blocks;
        for (int64_t n_tiles = std::min(left, tiles_.pieces()); n_tiles > 0; --n_tiles) {
          if (of_tiles[n_tiles].largest == 0) of_tiles[n_tiles] = tiles_.extent(n_tiles);
          const Cuts::Extent lanes = of_tiles[n_tiles];
          const double largest = static_cast<double>(pixels.largest) *
                                 static_cast<double>(channels.largest * lanes.largest);
          const double smallest = static_cast<double>(pixels.smallest) *
                                  static_cast<double>(channels.smallest * lanes.smallest);
          const auto n = static_cast<double>(n_parts * n_blocks * n_tiles);
          if (n * largest > kMostUneven * all) continue;
          if (smallest * static_cast<double>(taps_) >= kLeastProducts &&
              cost(pixels, channels, lanes, n_blocks) < best) {
            best = cost(pixels, channels, lanes, n_blocks);
            of_parts_ = n_parts, of_blocks_ = n_blocks, of_tiles_ = n_tiles;
          }
          break;
        }
      }
    }
  }

  double cost(const Cuts::Extent& pixels, const Cuts::Extent& channels, const Cuts::Extent& lanes,
              int64_t n_blocks) const {
    const int64_t copies = groups_together(divided_up(blocks_.pieces(), n_blocks));
    const int64_t of_a_pixel = channels.largest * lanes.largest * taps_ +
                               kProductsPerGrad * channels.largest +
                               input_cost_ * copies * lanes.largest;
    return static_cast<double>(pixels.largest) * static_cast<double>(of_a_pixel);
  }

  DirectShare all_;
  int64_t products_;
  // Only where there is something to choose.
  Cuts parts_, blocks_, tiles_;
  std::vector<int64_t> first_tile_;
  int64_t taps_ = 0, input_cost_ = 0;
  int64_t of_parts_ = 1, of_blocks_ = 1, of_tiles_ = 1;
};

}  // namespace neq
