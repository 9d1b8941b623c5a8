// Channels lie innermost: neighbouring threads have neighbouring neurons, and each a few columns.
#pragma once

#include "../common/ptx.cuh"
#include "common.cuh"

namespace neq::cuda {

// About so many neurons are a block's.
constexpr int kRowNeurons = 16, kSectorBytes = 32;

// Which vectors of a pixel hold a block's channels, and where each channel lies where these vectors
// lie one after the other. Channels ascend, so that those of a vector are neighbours.
struct ChannelSlots {
  int vector[kLanes];
  int at[kLanes];  // in elements
  int count;
};

struct alignas(kVectorBytes) BlockChannels {
  ChannelSlots dy, x;
  int first, neurons;
};

// By a warp, whose lanes below `neurons` have a channel each.
template <class T>
__device__ __forceinline__ void find_channels(int channel, int neurons, ChannelSlots& slots) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, vector = channel / kVector<T>;
  const int before = __shfl_sync(kAllLanes, vector, lane - 1);
  const bool leads = lane < neurons && (lane == 0 || before != vector);
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  const int slot = __popc(leaders & (kAllLanes >> (kLanes - 1 - lane))) - 1;
  if (leads) slots.vector[slot] = vector;
  slots.at[lane] = slot * kVector<T> + channel % kVector<T>;
  if (lane == 0) slots.count = __popc(leaders);
}

// Of kRowNeurons neurons, with those before them that share a sector of dY with the first one, but
// without those that share one with the first of the next block: no sector is read by two blocks.
template <class T>
__device__ __forceinline__ void find_block_channels(const Depthwise<T>& d, int block,
                                                    BlockChannels& found) {
  constexpr int kSector = kSectorBytes / static_cast<int>(sizeof(T));
  static_assert(kSector <= kRowNeurons && 2 * kRowNeurons == kLanes);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int nominal = block * kRowNeurons, next = nominal + kRowNeurons;
  const int i = nominal - kRowNeurons + lane;
  const int mine = i >= 0 && i < d.most ? static_cast<int>(d.order[i]) : 0;
  const int of_next = next < d.most ? static_cast<int>(d.order[next]) : 0;
  const int of_first = __shfl_sync(kAllLanes, mine, kRowNeurons);
  const int count = smaller(*d.count, d.most);
  const bool is_mine = i < nominal ? mine / kSector == of_first / kSector
                                   : next >= count || mine / kSector != of_next / kSector;
  const unsigned lanes =
      __ballot_sync(kAllLanes, nominal < count && i >= 0 && i < count && is_mine);
  const int first = __popc(~lanes & (lanes - 1)), neurons = __popc(lanes);
  const int neuron = __shfl_sync(kAllLanes, mine, (first + lane) % kLanes);
  find_channels<T>(neuron, neurons, found.dy);
  find_channels<T>(neuron / d.per_input, neurons, found.x);
  if (lane == 0) {
    found.first = nominal - kRowNeurons + first;
    found.neurons = neurons;
  }
}

// What a block multiplies in a step: one row of dY of each of some units, and the rows of X that
// come with it. A unit is a band of an image, or some strips of one that is too wide. Row after
// row, pixels lie beside each other in vectors, and are zeros where there are none.
template <class Taps>
struct RowTile {
  __device__ __forceinline__ RowTile(int out_width, int neurons, int dy_slots, int x_slots) {
    constexpr int kHalo = Taps::kSide - Taps::kStride, kStep = Taps::kOutputs * Taps::kStride;
    const int workers = kDepthwiseThreads / neurons;
    const int of_image = (out_width + Taps::kOutputs - 1) / Taps::kOutputs;
    const int of_strip = Taps::kOutputs * dy_slots + kStep * Taps::kStride * x_slots;
    const int fit = (Taps::kStageVectors - kHalo * Taps::kStride * x_slots) / of_strip;
    const int most = smaller(smaller(workers, fit), of_image);
    tiles = (of_image + most - 1) / most;
    strips = (of_image + tiles - 1) / tiles;
    x_columns = Taps::reach(strips * Taps::kOutputs);
    dy_vectors = strips * Taps::kOutputs * dy_slots;
    vectors = dy_vectors + Taps::kStride * x_columns * x_slots;
    together = smaller(workers / strips, Taps::kStageVectors / vectors);
  }

  int tiles, strips, x_columns;
  int dy_vectors, vectors;  // of a unit: dY's come first
  int together;
};

// Blocks: x for neurons, y for parts. Rows are copied some steps before they are multiplied.
template <class Taps>
__global__ void __launch_bounds__(kDepthwiseThreads, Taps::kRowBlocks)
    depthwise_rows_kernel(Depthwise<typename Taps::T> d) {
  using T = typename Taps::T;
  const int thread = static_cast<int>(threadIdx.x);
  auto& channels = *reinterpret_cast<BlockChannels*>(ptx::dynamic_shared());
  if (thread < kLanes) find_block_channels(d, static_cast<int>(blockIdx.x), channels);
  __syncthreads();
  const int neurons = channels.neurons;
  if (neurons <= 0) return;
  const int dy_slots = channels.dy.count, x_slots = channels.x.count;
  const RowTile<Taps> tile(d.out_width, neurons, dy_slots, x_slots);
  const int units = d.images * d.bands * tile.tiles;
  const int turns_of_all = (units + tile.together - 1) / tile.together;
  const auto parts = static_cast<int>(gridDim.y);
  const int per_part = (turns_of_all + parts - 1) / parts;
  const int first_turn = static_cast<int>(blockIdx.y) * per_part;
  const int turns = smaller(per_part, turns_of_all - first_turn);
  const int steps = d.rows + Taps::kDepth - 1;
  unsigned char* const stages = ptx::dynamic_shared() + sizeof(BlockChannels);

  // What this thread copies in each step: a vector of which unit, of which row, and where in it.
  struct Copied {
    uint8_t unit, row, slot;  // row 0: dY
    uint16_t column;
  };
  Copied copied[Taps::kCopies];
#pragma unroll
  for (int i = 0; i < Taps::kCopies; ++i) {
    const int at = thread + i * kDepthwiseThreads, within = at % tile.vectors;
    const int x_at = within - tile.dy_vectors, x_row = tile.x_columns * x_slots;
    const bool is_dy = x_at < 0;
    const int row = is_dy ? 0 : 1 + x_at / x_row, in_row = is_dy ? within : x_at % x_row;
    const int slots = is_dy ? dy_slots : x_slots;
    copied[i] = {static_cast<uint8_t>(at / tile.vectors), static_cast<uint8_t>(row),
                 static_cast<uint8_t>(in_row % slots), static_cast<uint16_t>(in_row / slots)};
  }
  // From where, and in which steps there is anything.
  const T* from[Taps::kCopies];
  int begin[Taps::kCopies], taken[Taps::kCopies];
  const auto begin_turn = [&](int turn) {
#pragma unroll
    for (int i = 0; i < Taps::kCopies; ++i) {
      if (i * kDepthwiseThreads >= tile.together * tile.vectors) break;
      const Copied& c = copied[i];
      const int unit = (first_turn + turn) * tile.together + c.unit;
      const int band_of_all = tile.tiles == 1 ? unit : unit / tile.tiles;
      const int image = d.bands == 1 ? band_of_all : band_of_all / d.bands;
      const int p = (band_of_all - image * d.bands) * d.rows;
      const int q = (unit - band_of_all * tile.tiles) * tile.strips * Taps::kOutputs;
      const int rows = smaller(d.rows, d.out_height - p);
      const int outputs = smaller(tile.strips * Taps::kOutputs, d.out_width - q);
      const bool exists = c.unit < tile.together && unit < units;
      begin[i] = 0;
      if (c.row == 0) {
        taken[i] = exists && c.column < outputs ? rows : 0;
        from[i] = d.dy + image * d.dy_strides.image + p * d.dy_strides.line +
                  (q + c.column) * d.dy_strides.column + channels.dy.vector[c.slot] * kVector<T>;
      } else {
        const int w = q * Taps::kStride - d.padding_w + c.column;
        const int top = p * Taps::kStride - d.padding_h, h = top + c.row - 1;
        const int bottom = smaller(d.height, top + Taps::reach(rows));
        const bool is_column = exists && c.column < Taps::reach(outputs) && w >= 0 && w < d.width;
        if (h < 0) begin[i] = (Taps::kStride - 1 - h) / Taps::kStride;
        taken[i] = is_column ? (bottom - h + Taps::kStride - 1) / Taps::kStride - begin[i] : 0;
        from[i] = d.x + image * d.x_strides.image + h * d.x_strides.line + w * d.x_strides.column +
                  channels.x.vector[c.slot] * kVector<T>;
      }
    }
  };
  int copied_turn = 0, copied_step = 0, copied_stage = 0;
  const auto copy = [&] {
    if (copied_turn < turns) {
      if (copied_step == 0) begin_turn(copied_turn);
      unsigned char* const to = stages + copied_stage * Taps::kStageBytes + thread * kVectorBytes;
#pragma unroll
      for (int i = 0; i < Taps::kCopies; ++i) {
        if (i * kDepthwiseThreads >= tile.together * tile.vectors) break;
        const bool take = copied_step >= begin[i] && copied_step - begin[i] < taken[i];
        ptx::cp_async_16(to + i * kDepthwiseThreads * kVectorBytes, take ? from[i] : d.x, take);
        from[i] += copied[i].row == 0 ? d.dy_strides.line : d.x_strides.line * Taps::kStride;
      }
      if (++copied_step == steps) copied_step = 0, ++copied_turn;
      copied_stage = copied_stage == Taps::kStages - 1 ? 0 : copied_stage + 1;
    }
    ptx::cp_async_commit();
  };

  const int worker = thread / neurons, strip = worker % tile.strips;
  const int unit = worker / tile.strips;
  const bool works = worker < kDepthwiseThreads / neurons && unit < tile.together;
  const int dy_pitch = dy_slots * kVector<T>, x_pitch = x_slots * kVector<T>;
  const int dy_at = unit * tile.vectors * kVector<T> + strip * Taps::kOutputs * dy_pitch +
                    channels.dy.at[thread % neurons];
  const int x_at = (unit * tile.vectors + tile.dy_vectors) * kVector<T> +
                   strip * Taps::kOutputs * Taps::kStride * x_pitch +
                   channels.x.at[thread % neurons];
  float sums[Taps::kNumber + 1] = {};
  // After the last step of a turn no row is left in here that the next one reads.
  float dy[Taps::kDepth][Taps::kOutputs] = {};
#pragma unroll 1
  for (int i = 0; i < Taps::kStages - 1; ++i) copy();
  int stage = 0;
#pragma unroll 1
  for (int step = 0, turn = 0; turn < turns;) {
    ptx::cp_async_wait<Taps::kStages - 2>();
    __syncthreads();
    copy();
    if (works) {
      const auto* const rows = reinterpret_cast<const T*>(stages + stage * Taps::kStageBytes);
#pragma unroll
      for (int i = Taps::kDepth - 1; i > 0; --i) {
#pragma unroll
        for (int q = 0; q < Taps::kOutputs; ++q) dy[i][q] = dy[i - 1][q];
      }
#pragma unroll
      for (int q = 0; q < Taps::kOutputs; ++q) {
        dy[0][q] = to_float(rows[dy_at + q * dy_pitch]);
        sums[Taps::kNumber] += dy[0][q];
      }
#pragma unroll
      for (int down = 0; down < Taps::kStride; ++down) {
        float x[Taps::kInputs];
#pragma unroll
        for (int i = 0; i < Taps::kInputs; ++i) {
          x[i] = to_float(rows[x_at + (down * tile.x_columns + i) * x_pitch]);
        }
        multiply_row<Taps>(sums, dy, x, down);
      }
    }
    stage = stage == Taps::kStages - 1 ? 0 : stage + 1;
    if (++step == steps) step = 0, ++turn;
  }
  __syncthreads();
  write_part(d, sums, channels.first, neurons, stages);
}

}  // namespace neq::cuda
