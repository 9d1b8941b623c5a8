#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../simd/kernels.h"
#include "../tensor/prefetch.h"
#include "../tensor/scratch.h"
#include "../tensor/shares.h"
#include "../tensor/split.h"
#include "../tensor/zeros.h"
#include "direct_operands.h"
#include "direct_schedule.h"
#include "gradient_shares.h"
#include "joined_loops.h"
#include "planes.h"

namespace neq {
namespace {

// The output rows, or columns, that read inside the input by each tap.
std::vector<Range> tap_ranges(const Axis& axis) {
  std::vector<Range> ranges;
  for (int64_t tap = 0; tap < axis.kernel; ++tap)
    ranges.push_back({axis.begin(tap), axis.end(tap)});
  return ranges;
}

// Calls among which the fetching of the next unit is divided: what fewer would fetch at a time is
// more than the CPU waits for at once.
constexpr int64_t kCallsToFetchIn = 4;

// Adds up dy[n] x[channels], pixel by pixel, for every tap of the kernel: elements of T, packed as
// elements of P, into a gradient of G.
template <class T, class P, class G>
class Direct {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = Operands<T, P>::kLanes, kBytes = sizeof(C);
  static constexpr int64_t kGradientBytes = sizeof(G);
  static constexpr int64_t kDoubleBytes = sizeof(double);
  static constexpr int64_t kDoublesPerLine = kLineBytes / kDoubleBytes;

  Direct(const ConvProblem& p, const T* grad, const T* input, bool channels_last, G* gradient,
         bool taps_inside, int64_t threads)
      : p_(p),
        o_(p, grad, input, channels_last),
        planes_(p, grad, input),
        gradient_(gradient),
        channels_last_(channels_last),
        taps_inside_(taps_inside && p.taps() > 1),
        taps_h_(tap_ranges(p.h)),
        taps_w_(tap_ranges(p.w)),
        units_(o_.units(), o_.parts(), 1),
        threads_(threads),
        schedule_(o_, p, units_, threads) {
    // Rows of the gradient that are no whole lines are not for several threads to add to.
    in_place_ =
        std::is_same_v<C, G> && units_.parts == 1 && !taps_inside_ &&
        o_.padded() == o_.channels() &&
        (schedule_.shares() == 1 || whole_lines(p.input_channels, kBytes) == p.input_channels);
    tap_of_sums_ = schedule_.cuts_rows() ? whole_lines(o_.padded(), kBytes) : o_.padded();
    row_of_sums_ = (o_.taps_as_channels() ? 1 : p.taps()) * tap_of_sums_;
    if (!in_place_) row_of_sums_ = whole_lines(row_of_sums_, kBytes);
  }

  std::vector<double> run() {
    const int64_t n = p_.n;
    const int64_t rows = units_.parts * n;
    static thread_local Scratch<C> scratch_of_sums;
    C* sums = in_place_ ? nullptr : scratch_of_sums.at_least(rows * row_of_sums_);
    std::vector<C*> sums_of(rows);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (std::is_same_v<C, G>) {
        if (in_place_) {
          sums_of[i] = gradient_ + p_.active[i] * row_of_sums_;
          continue;
        }
      }
      sums_of[i] = sums + i * row_of_sums_;
    }
    if (in_place_) clear_frozen();
    static thread_local Scratch<double> scratch_of_bias;
    const int64_t size_of_bias = p_.want_bias ? place_of_bias(units_.parts, 0, 0) : 0;
    double* bias = scratch_of_bias.at_least(size_of_bias);
    std::fill_n(bias, size_of_bias, 0.0);
    for_each_share(schedule_.shares(), [&](int64_t i) {
      const DirectShare share = schedule_.share(i);
      const bool adds_bias = p_.want_bias && share.tiles.begin == 0;
      for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
        double* bias_of_part =
            adds_bias ? bias + place_of_bias(part, schedule_.group_of(i), 0) : nullptr;
        const int64_t groups = groups_together(share.blocks.size());
        for (int64_t group = 0; group < groups; ++group) {
          const Range some = share_of(share.blocks.size(), group, groups);
          add_units({units_.begin(part), units_.end(part)},
                    {share.blocks.begin + some.begin, share.blocks.begin + some.end}, share.tiles,
                    sums_of.data() + part * n, bias_of_part);
        }
      }
    });
    if (!in_place_) write_sums(sums);
    return p_.want_bias ? whole_bias(bias) : std::vector<double>();
  }

  // The shares of both loops.
  void tell(ShareTable& table) const {
    const int64_t taps_of_sums = o_.taps_as_channels() ? 1 : p_.taps();
    for (int64_t i = 0; i < schedule_.shares(); ++i) {
      const DirectShare share = schedule_.share(i);
      const Range lanes = schedule_.lanes_of(i);
      const Range slots{
          o_.blocks()[share.blocks.begin].first,
          o_.blocks()[share.blocks.end - 1].first + o_.blocks()[share.blocks.end - 1].size};
      table.add_work(0, i, schedule_.products(i));
      for (int64_t part = share.parts.begin; part < share.parts.end; ++part) {
        for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
          const int64_t row = in_place_ ? p_.active[slot] : part * p_.n + slot;
          table.add_writes(0, i,
                           {in_place_, (row * row_of_sums_ + lanes.begin) * kBytes,
                            lanes.size() * kBytes, taps_of_sums, tap_of_sums_ * kBytes});
        }
        if (share.tiles.begin > 0) continue;
        const int64_t at = place_of_bias(part, schedule_.group_of(i), slots.begin);
        table.add_writes(0, i, {2, at * kDoubleBytes, slots.size() * kDoubleBytes});
      }
    }
    const int64_t taps = p_.taps();
    const GradientShares shares = gradient_shares();
    for (int64_t i = 0; i < shares.shares(); ++i) {
      table.add_work(1, i, shares.work(i));
      const auto tell_row = [&](int64_t slot, int64_t rows, Range channels) {
        const int64_t row = p_.active[slot] * taps * p_.input_channels;
        if (taps_inside_ || channels.size() == p_.input_channels) {
          table.add_writes(1, i,
                           {1, (row + channels.begin * taps) * kGradientBytes,
                            rows * channels.size() * taps * kGradientBytes});
        } else {
          table.add_writes(
              1, i,
              {1, (row + channels.begin) * kGradientBytes, channels.size() * kGradientBytes, taps,
               p_.input_channels * kGradientBytes});
        }
      };
      const auto tell_sums = [&](int64_t slot, Range channels) {
        if (in_place_) return;
        tell_row(slot, 1, channels);
        if (channels.size() == p_.input_channels) channels = {0, o_.padded()};
        table.add_writes(1, i,
                         {0, (slot * row_of_sums_ + channels.begin) * kBytes,
                          channels.size() * kBytes, taps_of_sums, tap_of_sums_ * kBytes});
      };
      shares.visit(i, tell_sums, tell_row);
    }
  }

 private:
  // Of units, for the channels of some blocks and tiles.
  void add_units(Range units, Range blocks, Range tiles, C* const* targets, double* bias) const {
    if (o_.takes_planes()) return add_planes(units, blocks, tiles, targets, bias);
    static thread_local Copies<P> copies;
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = o_.unit_at(u), next = o_.unit_at(std::min(u + 1, units.end - 1));
      const int64_t calls = (blocks.end - blocks.begin) * (tiles.end - tiles.begin);
      const bool fetches_next = !channels_last_ || calls >= kCallsToFetchIn;
      o_.pack_grad(unit, blocks.begin, blocks.end, !fetches_next, copies.grad);
      if (bias) o_.add_bias(unit, blocks.begin, blocks.end, copies.grad, bias);
      if (o_.taps_as_channels()) o_.fill_taps(unit, copies);
      Prefetcher<T> next_grad(o_.region_of_grad(next, blocks.begin, blocks.end), calls);
      Prefetcher<T> next_input(o_.region_of_input(next, tiles.begin, tiles.end), calls);
      for (int64_t t = tiles.begin, some = 0; t < tiles.end; t += some) {
        // All tiles of a block one after the other, if they can: so the rows of the gradient are
        // written from end to end.
        some = o_.tiles_together(unit, t, tiles.end);
        o_.read_input(unit, t, t + some, copies);
        const P* dy = copies.grad.data();
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
          const Block& block = o_.blocks()[b];
          for (int64_t i = 0; i < some; ++i) {
            const bool x_is_new = o_.reads_in_place() && b == blocks.begin;
            add(unit, dy, block, copies.tiles[i], o_.tiles()[t + i], targets, u == units.begin,
                x_is_new);
            if (u + 1 < units.end && fetches_next) {
              next_grad.fetch_some();
              if (!o_.reads_in_place()) next_input.fetch_some();
            }
          }
          dy += o_.elements_of(unit) * block.size;
        }
      }
    }
  }

  // The same, of what is multiplied where it lies.
  void add_planes(Range units, Range blocks, Range tiles, C* const* targets, double* bias) const {
    const int64_t calls = (blocks.end - blocks.begin) * (tiles.end - tiles.begin);
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = o_.unit_at(u), next = o_.unit_at(std::min(u + 1, units.end - 1));
      Prefetcher<T> next_grad(o_.region_of_grad(next, blocks.begin, blocks.end), calls);
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
          const Block& block = o_.blocks()[b];
          planes_.add(unit, block, o_.tiles()[t], targets, u == units.begin, b == blocks.begin);
          if (bias && t == tiles.begin) planes_.add_bias(unit, block, bias);
          if (u + 1 < units.end) next_grad.fetch_some();
        }
      }
    }
  }

  // Adds one unit to targets[n][tap][channel], for one block and the channels of one tile.
  void add(const Unit& unit, const P* dy, const Block& block, const Pixels<P>& x, const Tile& tile,
           C* const* targets, bool fresh, bool x_is_new) const {
    const int64_t at = tile.first;
    if (o_.taps_as_channels() || o_.apart() > 1) {
      const Runs runs = o_.runs_of(unit);
      const int64_t elements = divided_up(runs.pixels, o_.apart());
      const OuterProduct<P> o{1,           runs.count,
                              runs.pixels, dy,
                              0,           elements * block.size,
                              block.size,  x.data,
                              0,           elements * x.pixel,
                              x.pixel,     targets + block.first,
                              at,          fresh,
                              false};
      o_.kernels().outer_product(o, block.size, tile.vectors, tile.skip);
      return;
    }
    const int64_t stride_h = o_.stride_h(), stride_w = o_.stride_w();
    const int64_t dy_row = p_.w.output * block.size;
    for (int64_t r = 0; r < p_.h.kernel; ++r) {
      const int64_t p0 = std::max(unit.top, taps_h_[r].begin);
      const int64_t p1 = std::min(unit.bottom, taps_h_[r].end);
      const int64_t y0 = p0 * stride_h - p_.h.padding + r * p_.h.dilation - x.begin;
      for (int64_t s = 0; s < p_.w.kernel; ++s) {
        const int64_t q0 = taps_w_[s].begin, q1 = taps_w_[s].end;
        const int64_t sums = (r * p_.w.kernel + s) * tap_of_sums_ + at;
        if (p0 >= p1 || q0 >= q1) {
          if (fresh) clear(block, tile, targets, sums);
          continue;
        }
        const int64_t x0 = q0 * stride_w - p_.w.padding + s * p_.w.dilation;
        OuterProduct<P> o{unit.images,
                          p1 - p0,
                          q1 - q0,
                          dy + (p0 - unit.top) * dy_row + q0 * block.size,
                          (unit.bottom - unit.top) * dy_row,
                          dy_row,
                          block.size,
                          x.data + y0 * x.row + x0 * x.pixel,
                          x.image,
                          stride_h * x.row,
                          stride_w * x.pixel,
                          targets + block.first,
                          sums,
                          fresh,
                          x_is_new && r == 0 && s == 0};
        if constexpr (kIsPair<P>) {
          join_loops_of_pairs(o, o_.next_pixel() * x.pixel, o_.pairs_cross_rows());
          o.dy_column *= 2;
          o.x_column *= 2;
        } else {
          join_loops(o);
        }
        o_.kernels().outer_product(o, block.size, tile.vectors, tile.skip);
      }
    }
  }

  static void clear(const Block& block, const Tile& tile, C* const* targets, int64_t at) {
    for (int64_t i = block.first; i < block.first + block.size; ++i) {
      std::fill(targets[i] + at + tile.skip, targets[i] + at + tile.vectors * kLanes, C(0));
    }
  }

  // A line lies between the sums of one share and another's.
  int64_t place_of_bias(int64_t part, int64_t group, int64_t slot) const {
    return part * (p_.n + kDoublesPerLine * schedule_.groups()) + kDoublesPerLine * group + slot;
  }

  std::vector<double> whole_bias(const double* of_parts) const {
    std::vector<double> bias(p_.n);
    for (int64_t group = 0; group < schedule_.groups(); ++group) {
      const Range blocks = schedule_.blocks_of(group);
      const int64_t end = o_.blocks()[blocks.end - 1].first + o_.blocks()[blocks.end - 1].size;
      for (int64_t part = 0; part < units_.parts; ++part) {
        const double* from = of_parts + place_of_bias(part, group, 0);
        for (int64_t i = o_.blocks()[blocks.begin].first; i < end; ++i) bias[i] += from[i];
      }
    }
    return bias;
  }

  GradientShares gradient_shares() const {
    const int64_t active_cost = in_place_ ? 0 : units_.parts + 1;
    return {p_, kGradientBytes, active_cost, 1, !o_.taps_as_channels(), threads_};
  }

  void clear_frozen() const {
    write_gradient([](int64_t, Range) {});
  }

  // Zeros for frozen rows, and what `write` does for the channels of active ones.
  template <class Write>
  void write_gradient(const Write& write) const {
    const int64_t taps = p_.taps(), row = taps * p_.input_channels;
    const GradientShares shares = gradient_shares();
    for_each_share(shares.shares(), [&](int64_t share) {
      const Zeros zeros(p_.output_channels * row * kGradientBytes);
      shares.visit(share, write, [&](int64_t slot, int64_t rows, Range channels) {
        G* to = gradient_ + p_.active[slot] * row;
        if (taps_inside_ || channels.size() == p_.input_channels) {
          zeros.write(to + channels.begin * taps, rows * channels.size() * taps * kGradientBytes);
          return;
        }
        for (int64_t tap = 0; tap < taps; ++tap, to += p_.input_channels) {
          zeros.write(to + channels.begin, channels.size() * kGradientBytes);
        }
      });
    });
  }

  // Adds up the parts and puts the rows where they belong.
  void write_sums(C* sums) const {
    const int64_t row = p_.taps() * p_.input_channels;
    write_gradient([&](int64_t slot, Range channels) {
      C* total = sums + slot * row_of_sums_;
      add_parts(total, channels);
      write_row(total, channels, gradient_ + p_.active[slot] * row);
    });
  }

  // To the first one.
  void add_parts(C* total, Range channels) const {
    if (channels.size() == p_.input_channels) channels = {0, o_.padded()};
    int64_t taps = o_.taps_as_channels() ? 1 : p_.taps(), count = channels.size();
    if (count == tap_of_sums_) {
      count *= taps;
      taps = 1;
    }
    for (int64_t tap = 0; tap < taps; ++tap, total += tap_of_sums_) {
      const C* more = total;
      for (int64_t part = 1; part < units_.parts; ++part) {
        more += p_.n * row_of_sums_;
        for (int64_t j = channels.begin; j < channels.begin + count; ++j) total[j] += more[j];
      }
    }
  }

  void write_row(const C* total, Range channels, G* to) const {
    const int64_t taps = p_.taps();
    if (taps_inside_ && !o_.taps_as_channels()) {
      static thread_local Scratch<const C*> scratch;
      const C** planes = scratch.at_least(taps);
      for (int64_t tap = 0; tap < taps; ++tap) planes[tap] = total + tap * tap_of_sums_;
      to += channels.begin * taps;
      if constexpr (std::is_same_v<C, G>) {
        direct_kernels<C>().interleave(planes, taps, channels.begin, channels.size(), to, taps, 0,
                                       1);
      } else {
        static thread_local Scratch<C> scratch_of_row;
        C* row = scratch_of_row.at_least(channels.size() * taps);
        direct_kernels<C>().interleave(planes, taps, channels.begin, channels.size(), row, taps, 0,
                                       1);
        kernels<G>().round_row(row, channels.size() * taps, to);
      }
      return;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const C* from = total + tap * (o_.taps_as_channels() ? p_.input_channels : tap_of_sums_);
      G* target = to + (taps_inside_ ? tap : tap * p_.input_channels);
      if (!taps_inside_ && !std::is_same_v<C, G>) {
        kernels<G>().round_row(from + channels.begin, channels.size(), target + channels.begin);
        continue;
      }
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        target[taps_inside_ ? c * taps : c] = static_cast<G>(from[c]);
      }
    }
  }

  const ConvProblem& p_;
  const Operands<T, P> o_;
  const Planes<T, P> planes_;
  G* gradient_;
  bool channels_last_, taps_inside_;
  std::vector<Range> taps_h_, taps_w_;
  Split units_;
  int64_t threads_;
  DirectSchedule<T, P> schedule_;
  bool in_place_;
  int64_t tap_of_sums_, row_of_sums_;  // elements from a tap, and from a row, of sums to the next
};

bool is_empty(const ConvProblem& p) { return p.n == 0 || p.images * p.h.output * p.w.output == 0; }

}  // namespace

template <class T, class G>
std::vector<double> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last,
                                 G* gradient, bool taps_inside) {
  flatten_pixels(p, channels_last);
  if (is_empty(p)) {
    std::fill_n(gradient, p.output_channels * p.taps() * p.input_channels, G(0));
    return std::vector<double>(p.want_bias ? p.n : 0);
  }
  const int64_t threads = torch::stable::get_num_threads();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa() == Isa::avx512_bf16) {
      return Direct<T, Pair, G>(p, grad, input, channels_last, gradient, taps_inside, threads)
          .run();
    }
  }
  return Direct<T, Compute<T>, G>(p, grad, input, channels_last, gradient, taps_inside, threads)
      .run();
}

#define NEQ_DIRECT_WGRAD(T, G) \
  template std::vector<double> direct_wgrad(ConvProblem, const T*, const T*, bool, G*, bool);
NEQ_DIRECT_WGRAD(float, float)
NEQ_DIRECT_WGRAD(double, double)
NEQ_DIRECT_WGRAD(BFloat16, BFloat16)
NEQ_DIRECT_WGRAD(BFloat16, float)
NEQ_DIRECT_WGRAD(Half, Half)
NEQ_DIRECT_WGRAD(Half, float)
#undef NEQ_DIRECT_WGRAD

void direct_wgrad_shares(ConvProblem p, bool channels_last, bool taps_inside, bool half,
                         int64_t threads, ShareTable& shares) {
  flatten_pixels(p, channels_last);
  if (is_empty(p)) return;
  const auto tell = [&](auto zero) {
    using T = decltype(zero);
    Direct<T, Compute<T>, T>(p, nullptr, nullptr, channels_last, nullptr, taps_inside, threads)
        .tell(shares);
  };
  if (half) return tell(BFloat16{});
  tell(float{});
}

}  // namespace neq
