#include "direct_wgrad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../simd/kernels.h"
#include "../tensor/prefetch.h"
#include "../tensor/runs.h"
#include "../tensor/scratch.h"
#include "../tensor/split.h"
#include "../tensor/zeros.h"
#include "direct_operands.h"

namespace neq {
namespace {

// Blocks whose pixels of a unit fit into the second cache.
constexpr int64_t kBlocksTogether = 32, kMostBlocksTogether = 48;
constexpr int64_t kEnoughItems = 8;  // for a thread, where they cannot be shared out evenly

// A 1x1 convolution is a product of matrices: the pixels of an image, or of all images, form a row.
void flatten_pixels(ConvProblem& p, bool channels_last) {
  for (const Axis* axis : {&p.h, &p.w}) {
    if (axis->kernel != 1 || axis->stride != 1 || axis->padding != 0) return;
  }
  int64_t pixels = p.h.output * p.w.output;
  if (channels_last) {
    pixels *= p.images;
    p.images = 1;
  }
  p.h = {pixels, pixels, 1, 1, 0, 1};
  p.w = {1, 1, 1, 1, 0, 1};
}

struct Range {
  int64_t begin, end;
};

// The output rows, or columns, that read inside the input by each tap.
std::vector<Range> tap_ranges(const Axis& axis) {
  std::vector<Range> ranges;
  for (int64_t tap = 0; tap < axis.kernel; ++tap)
    ranges.push_back({axis.begin(tap), axis.end(tap)});
  return ranges;
}

// Adds up dy[n] x[channels], pixel by pixel, for every tap of the kernel.
template <class T>
class Direct {
 public:
  static constexpr int64_t kLanes = Operands<T>::kLanes;

  Direct(const ConvProblem& p, const T* grad, const T* input, bool channels_last, T* gradient,
         bool taps_inside)
      : p_(p),
        o_(p, grad, input, channels_last),
        gradient_(gradient),
        taps_inside_(taps_inside && p.taps() > 1),
        taps_h_(tap_ranges(p.h)),
        taps_w_(tap_ranges(p.w)) {}

  std::vector<double> run() {
    const int64_t n = p_.n;
    const int64_t size = o_.size_of_sums();
    // The bits depend on the number of parts, so it follows from the shape; they do not depend on
    // how blocks and tiles are shared out.
    const Split units(o_.units(), o_.parts(), 1);
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(),
                          static_cast<int64_t>(o_.products() / kProductsPerItem) + 1);
    const Split groups(static_cast<int64_t>(o_.blocks().size()), number_of_groups(threads), 1);
    // Each chunk of tiles packs dy for itself, so tiles are shared out only where the rest would
    // leave threads without work.
    const int64_t others = units.parts * groups.parts;
    const bool is_even = others % threads == 0 || others >= kEnoughItems * threads;
    const Split chunks(static_cast<int64_t>(o_.tiles().size()), is_even ? 1 : threads, 1);

    const bool in_place = units.parts == 1 && !taps_inside_ && o_.padded() == o_.channels();
    static thread_local Scratch<T> scratch_of_sums;
    T* sums = in_place ? nullptr : scratch_of_sums.at_least(units.parts * n * size);
    std::vector<T*> sums_of(units.parts * n);
    for (int64_t i = 0; i < units.parts * n; ++i) {
      sums_of[i] = in_place ? gradient_ + p_.active[i] * size : sums + i * size;
    }
    if (in_place) clear_frozen(size);
    std::vector<double> bias(p_.want_bias ? units.parts * n : 0);
    torch::stable::parallel_for(0, others * chunks.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks.parts, group = item / chunks.parts % groups.parts;
        const int64_t part = item / chunks.parts / groups.parts;
        add_units({units.begin(part), units.end(part)}, {groups.begin(group), groups.end(group)},
                  {chunks.begin(chunk), chunks.end(chunk)}, sums_of.data() + part * n,
                  p_.want_bias && chunk == 0 ? bias.data() + part * n : nullptr);
      }
    });
    if (!in_place) write_gradient(sums, units.parts, size);
    for (int64_t part = 1; p_.want_bias && part < units.parts; ++part) {
      for (int64_t i = 0; i < n; ++i) bias[i] += bias[part * n + i];
    }
    bias.resize(p_.want_bias ? n : 0);
    return bias;
  }

 private:
  // Of blocks. Where there are several anyway, as many as the threads can share evenly.
  int64_t number_of_groups(int64_t threads) const {
    const auto blocks = static_cast<int64_t>(o_.blocks().size());
    const int64_t groups = divided_up(blocks, kBlocksTogether);
    if (groups == 1 || o_.parts() % threads == 0) return groups;
    const int64_t more = divided_up(groups, threads) * threads, fewer = more - threads;
    return fewer > 0 && blocks <= fewer * kMostBlocksTogether ? fewer : more;
  }

  // Of units, for the channels of some blocks and tiles.
  void add_units(Range units, Range blocks, Range tiles, T* const* targets, double* bias) const {
    static thread_local Copies<T> copies;
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = o_.unit_at(u), next = o_.unit_at(std::min(u + 1, units.end - 1));
      o_.pack_grad(unit, blocks.begin, blocks.end, copies.grad);
      if (bias) o_.add_bias(unit, blocks.begin, blocks.end, copies.grad, bias);
      if (o_.taps_as_channels()) o_.fill_taps(unit, copies);
      const int64_t calls = (blocks.end - blocks.begin) * (tiles.end - tiles.begin);
      Prefetcher<T> next_grad(o_.region_of_grad(next, blocks.begin, blocks.end), calls);
      Prefetcher<T> next_input(o_.region_of_input(next, tiles.begin, tiles.end), calls);
      for (int64_t t = tiles.begin, some = 0; t < tiles.end; t += some) {
        // All tiles of a block one after the other, if they can: so the rows of the gradient are
        // written from end to end.
        some = o_.tiles_together(unit, t, tiles.end);
        o_.read_input(unit, t, t + some, copies);
        const T* dy = copies.grad.data();
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
          const Block& block = o_.blocks()[b];
          for (int64_t i = 0; i < some; ++i) {
            add(unit, dy, block, copies.tiles[i], o_.tiles()[t + i], targets, u == units.begin);
            if (u + 1 < units.end) {
              next_grad.fetch_some();
              if (!o_.reads_in_place()) next_input.fetch_some();
            }
          }
          dy += o_.pixels_of(unit) * block.size;
        }
      }
    }
  }

  // Adds one unit to targets[n][tap][channel], for one block and the channels of one tile.
  void add(const Unit& unit, const T* dy, const Block& block, const Pixels<T>& x, const Tile& tile,
           T* const* targets, bool fresh) const {
    const int64_t at = tile.first;
    if (o_.taps_as_channels()) {
      const OuterProduct<T> o{1, 1,       o_.pixels_of(unit),    dy, 0,    0, block.size, x.data, 0,
                              0, x.pixel, targets + block.first, at, fresh};
      kernels<T>().outer_product(o, block.size, tile.vectors, tile.skip);
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
        const int64_t sums = (r * p_.w.kernel + s) * o_.padded() + at;
        if (p0 >= p1 || q0 >= q1) {
          if (fresh) clear(block, tile, targets, sums);
          continue;
        }
        const int64_t x0 = q0 * stride_w - p_.w.padding + s * p_.w.dilation;
        OuterProduct<T> o{unit.images,
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
                          fresh};
        join_loops(o);
        kernels<T>().outer_product(o, block.size, tile.vectors, tile.skip);
      }
    }
  }

  static void clear(const Block& block, const Tile& tile, T* const* targets, int64_t at) {
    for (int64_t i = block.first; i < block.first + block.size; ++i) {
      std::fill(targets[i] + at + tile.skip, targets[i] + at + tile.vectors * kLanes, T(0));
    }
  }

  // Loops that go on where the one inside of them ends become one.
  static void join_loops(OuterProduct<T>& o) {
    if (o.images == 1 || (o.dy_image == o.rows * o.dy_row && o.x_image == o.rows * o.x_row)) {
      o.rows *= o.images;
      o.images = 1;
    }
    if (o.columns == 1) {
      o.dy_column = o.dy_row;
      o.x_column = o.x_row;
      std::swap(o.rows, o.columns);
    } else if (o.dy_row == o.columns * o.dy_column && o.x_row == o.columns * o.x_column) {
      o.columns *= o.rows;
      o.rows = 1;
    }
  }

  // Adds up the parts and puts the rows where they belong.
  void write_gradient(T* sums, int64_t parts, int64_t size) const {
    const int64_t n = p_.n, taps = p_.taps(), row = taps * p_.input_channels;
    constexpr auto bytes = static_cast<int64_t>(sizeof(T));
    const auto write_row = [&](int64_t i, const Zeros& zeros) {
      T* to = gradient_ + p_.active[i] * row;
      if (i >= n) {
        zeros.write(to, row * bytes);
        return;
      }
      T* total = sums + i * size;
      for (int64_t part = 1; part < parts; ++part) {
        const T* more = total + part * n * size;
        for (int64_t j = 0; j < size; ++j) total[j] += more[j];
      }
      if (taps_inside_ && !o_.taps_as_channels()) {
        std::vector<const T*> planes(taps);
        for (int64_t tap = 0; tap < taps; ++tap) planes[tap] = total + tap * o_.padded();
        kernels<T>().interleave(planes.data(), taps, 0, p_.input_channels, to, taps);
        return;
      }
      const int64_t channels = p_.input_channels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* from = total + tap * (o_.taps_as_channels() ? channels : o_.padded());
        T* target = to + (taps_inside_ ? tap : tap * channels);
        for (int64_t c = 0; c < channels; ++c) target[taps_inside_ ? c * taps : c] = from[c];
      }
    };
    for_each_range(0, p_.output_channels, row * (1 + parts), [&](int64_t begin, int64_t end) {
      const Zeros zeros(p_.output_channels * row * bytes);
      for (int64_t i = begin; i < end; ++i) write_row(i, zeros);
    });
  }

  // Rows of `size` elements; neighbours are written in one go.
  void clear_frozen(int64_t size) const {
    const int64_t row_bytes = size * static_cast<int64_t>(sizeof(T));
    for_each_range(p_.n, p_.output_channels, size, [&](int64_t begin, int64_t end) {
      const Zeros zeros(p_.output_channels * row_bytes);
      for (int64_t i = begin, next = begin; i < end; i = next) {
        do ++next;
        while (next < end && p_.active[next] == p_.active[next - 1] + 1);
        zeros.write(gradient_ + p_.active[i] * size, (next - i) * row_bytes);
      }
    });
  }

  template <class F>
  static void for_each_range(int64_t first, int64_t last, int64_t size, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, size));
    torch::stable::parallel_for(first, last, grain, f);
  }

  const ConvProblem& p_;
  const Operands<T> o_;
  T* gradient_;
  bool taps_inside_;
  std::vector<Range> taps_h_, taps_w_;
};

}  // namespace

template <class T>
std::vector<double> direct_wgrad(ConvProblem p, const T* grad, const T* input, bool channels_last,
                                 T* gradient, bool taps_inside) {
  flatten_pixels(p, channels_last);
  if (p.n == 0 || p.images * p.h.output * p.w.output == 0) {
    std::fill_n(gradient, p.output_channels * p.taps() * p.input_channels, T(0));
    return std::vector<double>(p.want_bias ? p.n : 0);
  }
  return Direct<T>(p, grad, input, channels_last, gradient, taps_inside).run();
}

template std::vector<double> direct_wgrad(ConvProblem, const float*, const float*, bool, float*,
                                          bool);
template std::vector<double> direct_wgrad(ConvProblem, const double*, const double*, bool, double*,
                                          bool);

}  // namespace neq
