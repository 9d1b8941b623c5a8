#include "runs.h"

#include "strides.h"

namespace neq {

Blocks checked_blocks(const Tensor& tensor, const char* name, int64_t groups, int64_t outer,
                      int64_t per_group, int64_t inner) {
  const Blocks blocks{groups, outer, per_group, inner};
  require(
      groups > 0 && outer >= 0 && per_group >= 0 && inner >= 0 && blocks.numel() == tensor.numel(),
      name, ": expected blocks of ", tensor.numel(), " elements, got (", groups, ", ", outer, ", ",
      per_group, ", ", inner, ")");
  require_cpu(tensor, name);
  require(tensor.is_contiguous() || is_dense(tensor, memory_order(tensor)), name,
          ": expected a dense tensor");
  return blocks;
}

std::vector<Run> find_runs(const int64_t* order, int64_t begin, int64_t end, int64_t per_group,
                           const int64_t* labels, int64_t max_length) {
  std::vector<Run> runs;
  bool in_order = true;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t neuron = order[slot], group = neuron / per_group;
    if (!runs.empty()) {
      Run& last = runs.back();
      const int64_t previous = order[slot - 1];
      if (neuron == previous + 1 && group == last.group && last.length < max_length &&
          (labels == nullptr || labels[neuron] == labels[previous])) {
        ++last.length;
        continue;
      }
      in_order = in_order && previous < neuron;
    }
    runs.push_back({group, neuron % per_group, 1, slot});
  }
  if (!in_order) {
    std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
      return std::tie(a.group, a.first) < std::tie(b.group, b.first);
    });
  }
  return runs;
}

void Pieces::add(const Blocks& blocks, const std::vector<Run>& runs) {
  const int64_t row_stride = blocks.per_group * blocks.inner;
  for (size_t r = 0; r < runs.size();) {
    const int64_t group = runs[r].group, first_piece = static_cast<int64_t>(pieces_.size());
    int64_t row_cost = 0;
    for (; r < runs.size() && runs[r].group == group; ++r) {
      const int64_t elements = runs[r].length * blocks.inner;
      for (int64_t begin = 0; begin < elements; begin += kPieceElements) {
        const int64_t count = std::min(kPieceElements, elements - begin);
        pieces_.push_back({runs_ + static_cast<int64_t>(r), begin,
                           runs[r].first * blocks.inner + begin, count, row_cost});
        row_cost += count + kPieceOverhead;
      }
    }
    const int64_t n_pieces = static_cast<int64_t>(pieces_.size()) - first_piece;
    if (n_pieces == 0 || blocks.outer == 0) continue;
    bands_.push_back({parts_, first_piece, n_pieces, blocks.outer, row_cost, row_stride,
                      group * blocks.outer * row_stride, cost_});
    cost_ += blocks.outer * row_cost;
  }
  ++parts_;
  runs_ += static_cast<int64_t>(runs.size());
}

int64_t Pieces::shares_for(int64_t threads) const {
  return even_shares(worthwhile(threads, cost_, kLeastElements), cost_, [&](int64_t shares) {
    int64_t largest = 0, before = 0;
    for (int64_t i = 1; i <= shares; ++i) {
      const int64_t end = cost_before(begin_of(i, shares));
      largest = std::max(largest, end - before);
      before = end;
    }
    return largest;
  });
}

// The nearest place where a thread may begin, or else the next one.
Pieces::Place Pieces::begin_of(int64_t share, int64_t shares) const {
  const Place end{n_bands(), 0, 0, 0};
  if (share == 0) return {0, 0, 0, 0};
  if (share == shares) return end;
  Place place = at_cost(cost_ * share / shares);
  while (place < end && !begins_a_line(place)) place = after(place);
  return place;
}

// The cut that is nearest to where so much of the cost lies before.
Pieces::Place Pieces::at_cost(int64_t cost) const {
  const auto band = std::upper_bound(bands_.begin(), bands_.end(), cost,
                                     [](int64_t c, const Band& b) { return c < b.cost_before; }) -
                    1;
  const int64_t row = (cost - band->cost_before) / band->row_cost;
  const int64_t in_row = cost - band->cost_before - row * band->row_cost;
  const Piece* pieces = pieces_.data() + band->first_piece;
  const Piece* piece =
      std::upper_bound(pieces, pieces + band->n_pieces, in_row,
                       [](int64_t c, const Piece& p) { return c < p.cost_before; }) -
      1;
  const int64_t cuts = (in_row - piece->cost_before + kCutElements / 2) / kCutElements;
  const Place place{band - bands_.begin(), row, piece - pieces, cuts * kCutElements};
  return place.offset < piece->count ? place : after(place);
}

Pieces::Place Pieces::after(Place place) const {
  const Band& band = bands_[place.band];
  place.offset = 0;
  if (++place.piece < band.n_pieces) return place;
  place.piece = 0;
  if (++place.row < band.rows) return place;
  place.row = 0;
  ++place.band;
  return place;
}

// Whether no element before lies in its line.
bool Pieces::begins_a_line(const Place& place) const {
  const int64_t byte = byte_of(place);
  if (byte % kLineBytes == 0) return true;
  if (place.offset > 0) return false;
  Place before = place;
  if (before.piece > 0) {
    --before.piece;
  } else {
    if (before.row > 0) {
      --before.row;
    } else if (before.band > 0) {
      --before.band;
      if (bands_[before.band].part != bands_[place.band].part) return true;
      before.row = bands_[before.band].rows - 1;
    } else {
      return true;
    }
    before.piece = bands_[before.band].n_pieces - 1;
  }
  const Piece& last = pieces_[bands_[before.band].first_piece + before.piece];
  return (byte_of(before) + last.count * item_bytes_ - 1) / kLineBytes < byte / kLineBytes;
}

int64_t Pieces::cost_before(const Place& place) const {
  if (place.band == n_bands()) return cost_;
  const Band& band = bands_[place.band];
  return band.cost_before + place.row * band.row_cost +
         pieces_[band.first_piece + place.piece].cost_before + place.offset;
}

int64_t Pieces::byte_of(const Place& place) const {
  const Band& band = bands_[place.band];
  return (band.offset + place.row * band.row_stride +
          pieces_[band.first_piece + place.piece].offset + place.offset) *
         item_bytes_;
}

}  // namespace neq
