// Weight and bias gradients of the active channels of a depthwise convolution, in parts:
//
//   sums[i, r, s] = sum over n, p, q of dY[n, order[i], p, q] *
//                   X[n, order[i] / per_input, p * stride + r - padding, q * stride + s - padding]
//
// A thread has one neuron and all of its taps, and goes down the rows of an image: each row of X is
// multiplied with the rows of dY that its taps reach, which are still in registers. All rows are
// copied to shared memory first. Where channels lie innermost (rows), neighbouring threads have
// neighbouring neurons and each a few columns; where pixels do (planes), they have neighbouring
// columns. A third kernel, of a few taps at a time, takes any kernel size, dilation and strides.
#pragma once

#include "../common/elements.cuh"
#include "../common/ptx.cuh"
#include "../common/slots.cuh"
#include "../common/stretch.cuh"

namespace neq::cuda {

constexpr int kDepthwiseThreads = 128, kDepthwiseWarps = kDepthwiseThreads / kLanes;

// In elements.
struct ImageStrides {
  int64_t image, channel, line, column;
};

// `parts` is float[parts, most, taps], `bias_parts` float[parts, most] or null, of whose `most`
// neurons the first `count` are written.
template <class T>
struct Depthwise {
  const T* dy;
  const T* x;
  ImageStrides dy_strides, x_strides;
  const int64_t* order;
  const int32_t* count;
  float* parts;
  float* bias_parts;
  int images, height, width, out_height, out_width, kernel_height, kernel_width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int per_input, most;
  int across;            // neurons of a block, or about as many where channels lie innermost
  int rows, bands;       // output rows of a band, and bands of an image
  int columns;           // of depthwise_any_kernel: threads that share a row
  int together, pieces;  // of planes: bands in shared memory, and pieces of each
  int units, per_part;   // of work: of a block's part units are taken in turns
};

// The share of one part.
struct UnitsOfPart {
  template <class T>
  __device__ __forceinline__ explicit UnitsOfPart(const Depthwise<T>& d)
      : first(static_cast<int>(
            smaller<int64_t>(static_cast<int64_t>(blockIdx.y) * d.per_part, d.units))),
        end(static_cast<int>(smaller<int64_t>(first + static_cast<int64_t>(d.per_part), d.units))) {
  }

  int first, end;
};

// How taps of a square kernel go together with rows: an input row is read by every kStride-th tap,
// which are kDepth at most.
template <class T_, int kSide_, int kStride_>
struct Taps {
  using T = T_;
  static constexpr int kSide = kSide_, kStride = kStride_, kNumber = kSide * kSide;
  static constexpr int kDepth = (kSide + kStride - 1) / kStride;
  // A strip's columns of dY, and those of X that they reach.
  static constexpr int kOutputs = kSide == 7 ? 4 : 8 / kStride,
                       kInputs = (kOutputs - 1) * kStride + kSide;
  // Of channels innermost: a stage has room for one strip of as many neurons as there are lanes,
  // each in a vector of its own.
  static constexpr int kCopies =
      (kLanes * (kOutputs + kStride * kInputs) + kDepthwiseThreads - 1) / kDepthwiseThreads;
  static constexpr int kStageVectors = kCopies * kDepthwiseThreads;
  static constexpr int kStageBytes = kStageVectors * kVectorBytes;
  static constexpr int kStages = (48 << 10) / kStageBytes;
  // Blocks on a multiprocessor: as many as there are registers for.
  static constexpr int kRowBlocks = kSide == 3 ? 4 : 3;
  static constexpr int kPlaneBlocks = kSide == 3 ? 8 : kSide == 5 ? 6 : 4;

  // Input rows or columns that so many output ones reach.
  static __device__ __forceinline__ int reach(int outputs) {
    return (outputs - 1) * kStride + kSide;
  }
};

// One float for each sum of each thread; the pitch spreads a thread's over the banks.
constexpr int kSumsPitch = kDepthwiseThreads + 1;
template <int kSums>
constexpr int kSumsShared = kSums * kSumsPitch * static_cast<int>(sizeof(float));

// Adds the sums of all threads of a neuron, and calls `write(neuron, j, sum)` for each of them.
// Thread i has neuron i % across.
template <int kSums, class Write>
__device__ __forceinline__ void add_threads(const float (&sums)[kSums], int across, int neurons,
                                            unsigned char* shared, const Write& write) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* const of_threads = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < kSums; ++j) of_threads[j * kSumsPitch + thread] = sums[j];
  __syncthreads();
  const int workers = kDepthwiseThreads / across;
  for (int i = thread; i < neurons * kSums; i += kDepthwiseThreads) {
    // Those of taps before the last ones: neighbours are neighbours in memory.
    const bool is_last = i >= neurons * (kSums - 1);
    const int neuron = is_last ? i - neurons * (kSums - 1) : i / (kSums - 1);
    const int j = is_last ? kSums - 1 : i % (kSums - 1);
    float sum = 0;
#pragma unroll 8
    for (int worker = 0; worker < workers; ++worker) {
      sum += of_threads[j * kSumsPitch + worker * across + neuron];
    }
    write(neuron, j, sum);
  }
}

// The same for all taps and, as the last sum, the bias.
template <int kSums, class T>
__device__ __forceinline__ void write_part(const Depthwise<T>& d, const float (&sums)[kSums],
                                           int first, int neurons, unsigned char* shared) {
  add_threads(sums, neurons, neurons, shared, [&](int neuron, int j, float sum) {
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * d.most + first + neuron;
    if (j < kSums - 1) {
      d.parts[slot * (kSums - 1) + j] = sum;
    } else if (d.bias_parts != nullptr) {
      d.bias_parts[slot] = sum;
    }
  });
}

// A step down: `dy` holds rows of dY, the latest first, and `x` is the input row `down` (of
// kStride) below the one that the first tap of the latest one reads.
template <class Taps, int kOutputs, int kInputs>
__device__ __forceinline__ void multiply_row(float (&sums)[Taps::kNumber + 1],
                                             const float (&dy)[Taps::kDepth][kOutputs],
                                             const float (&x)[kInputs], int down) {
#pragma unroll
  for (int i = 0; i < Taps::kDepth; ++i) {
    const int r = down + i * Taps::kStride;
    if (r >= Taps::kSide) break;
#pragma unroll
    for (int s = 0; s < Taps::kSide; ++s) {
#pragma unroll
      for (int q = 0; q < kOutputs; ++q) {
        sums[r * Taps::kSide + s] += dy[i][q] * x[q * Taps::kStride + s];
      }
    }
  }
}

// --- channels innermost --------------------------------------------------------------------------

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

// --- pixels innermost ----------------------------------------------------------------------------

// A band of one channel of an image; rows of X outside of the image are left out.
template <class Taps>
struct Band {
  using T = typename Taps::T;

  __device__ __forceinline__ Band(const Depthwise<T>& d, int neuron, int unit) {
    // Most images are bands of their own.
    const int image = d.bands == 1 ? unit : unit / d.bands;
    const int p = (unit - image * d.bands) * d.rows;
    rows = smaller(d.rows, d.out_height - p);
    const int h = p * Taps::kStride - d.padding_h, end = h + Taps::reach(rows);
    const int top = h < 0 ? 0 : h, bottom = smaller(end, d.height);
    above = top - h;
    x_rows = bottom > top ? bottom - top : 0;
    dy = {d.dy,
          d.dy + image * d.dy_strides.image + neuron * d.dy_strides.channel +
              static_cast<int64_t>(p) * d.out_width,
          rows * d.out_width};
    x = {d.x,
         d.x + image * d.x_strides.image + neuron / d.per_input * d.x_strides.channel +
             static_cast<int64_t>(top) * d.width,
         x_rows * d.width};
  }

  Stretch<T> dy, x;
  int rows, x_rows, above;
};

// Calls `copy(i, vector)` for every vector of `bands` bands, by all threads.
template <class Copy>
__device__ __forceinline__ void copy_bands(int bands, int vectors, const Copy& copy) {
  const int thread = static_cast<int>(threadIdx.x);
  int band = thread / vectors, vector = thread % vectors;
  while (band < bands) {
    copy(band, vector);
    band += kDepthwiseThreads / vectors;
    vector += kDepthwiseThreads % vectors;
    if (vector >= vectors) vector -= vectors, ++band;
  }
}

constexpr int kPlaneStages = 2, kPlaneOutputs = 2;

// Blocks: x for neurons, y for parts. Units are bands of images, of which some lie in shared memory
// together while the next ones are copied. Rows lie one after the other. A thread has neighbouring
// columns of a band, or a piece of them.
template <class Taps>
__global__ void __launch_bounds__(kDepthwiseThreads, Taps::kPlaneBlocks)
    depthwise_planes_kernel(Depthwise<typename Taps::T> d) {
  using T = typename Taps::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x);
  // One thread reads for all which neuron it is.
  auto* const shared_neuron = reinterpret_cast<int*>(ptx::dynamic_shared());
  if (thread == 0) {
    const int64_t found = d.order[first];
    *shared_neuron = first < *d.count ? static_cast<int>(found) : -1;
  }
  __syncthreads();
  const int neuron = *shared_neuron;
  if (neuron < 0) return;
  const UnitsOfPart units(d);
  const int dy_vectors = Stretch<T>::most_vectors(d.rows * d.out_width);
  const int x_vectors = Stretch<T>::most_vectors(smaller(Taps::reach(d.rows), d.height) * d.width);
  // `turn` counts steps.
  const auto stage_dy = [&](int turn) {
    auto* const stages = reinterpret_cast<T*>(ptx::dynamic_shared()) + kVector<T>;
    return stages + turn % kPlaneStages * d.together * (dy_vectors + x_vectors) * kVector<T>;
  };
  const auto stage_x = [&](int turn) {
    return stage_dy(turn) + d.together * dy_vectors * kVector<T>;
  };
  const auto copy = [&](int turn) {
    const int unit = units.first + turn * d.together;
    const int bands = smaller(d.together, units.end - unit);
    copy_bands(bands, dy_vectors, [&](int i, int vector) {
      Band<Taps>(d, neuron, unit + i).dy.copy(stage_dy(turn) + i * dy_vectors * kVector<T>, vector);
    });
    copy_bands(bands, x_vectors, [&](int i, int vector) {
      Band<Taps>(d, neuron, unit + i).x.copy(stage_x(turn) + i * x_vectors * kVector<T>, vector);
    });
    ptx::cp_async_commit();
  };

  float sums[Taps::kNumber + 1] = {};
  const int across = (d.out_width + kPlaneOutputs - 1) / kPlaneOutputs;
  const int threads = across * d.pieces, piece_rows = (d.rows + d.pieces - 1) / d.pieces;
  copy(0);
  for (int turn = 0; turn * d.together < units.end - units.first; ++turn) {
    const int unit = units.first + turn * d.together;
    const int bands = smaller(d.together, units.end - unit);
    copy(turn + 1);
    ptx::cp_async_wait<kPlaneStages - 1>();
    __syncthreads();
    for (int i = thread; i < bands * threads; i += kDepthwiseThreads) {
      const int number = i / threads, piece = i % threads / across;
      const int q = i % across * kPlaneOutputs, outputs = smaller(kPlaneOutputs, d.out_width - q);
      const Band<Taps> band(d, neuron, unit + number);
      const int p = piece * piece_rows, rows = smaller(piece_rows, band.rows - p);
      const T* const dy_columns =
          stage_dy(turn) + number * dy_vectors * kVector<T> + band.dy.shift() + p * d.out_width + q;
      const int w = q * Taps::kStride - d.padding_w;
      const T* const x_columns =
          stage_x(turn) + number * x_vectors * kVector<T> + band.x.shift() + w;
      constexpr int kInputs = (kPlaneOutputs - 1) * Taps::kStride + Taps::kSide;
      const int begin = w < 0 ? -w : 0, end = smaller(Taps::reach(outputs), d.width - w);
      float dy[Taps::kDepth][kPlaneOutputs] = {};
      const int steps = rows > 0 ? rows + Taps::kDepth - 1 : 0;
      for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int j = Taps::kDepth - 1; j > 0; --j) {
#pragma unroll
          for (int o = 0; o < kPlaneOutputs; ++o) dy[j][o] = dy[j - 1][o];
        }
#pragma unroll
        for (int o = 0; o < kPlaneOutputs; ++o) {
          const bool take = step < rows && o < outputs;
          dy[0][o] = take ? to_float(dy_columns[step * d.out_width + o]) : 0.0f;
          sums[Taps::kNumber] += dy[0][o];
        }
#pragma unroll
        for (int down = 0; down < Taps::kStride; ++down) {
          const int row = (p + step) * Taps::kStride + down - band.above;
          const bool is_row = row >= 0 && row < band.x_rows;
          float x[kInputs];
#pragma unroll
          for (int c = 0; c < kInputs; ++c) {
            const bool take = is_row && c >= begin && c < end;
            x[c] = take ? to_float(x_columns[row * d.width + c]) : 0.0f;
          }
          multiply_row<Taps>(sums, dy, x, down);
        }
      }
    }
    __syncthreads();
  }
  write_part(d, sums, first, 1, ptx::dynamic_shared() + kVectorBytes);
}

// --- anything else -------------------------------------------------------------------------------

constexpr int kSomeTaps = 8;

// Blocks: x for neurons, y for parts, z for taps. Units are output rows; `columns` threads share
// one.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads, 4) depthwise_any_kernel(Depthwise<T> d) {
  const int thread = static_cast<int>(threadIdx.x), worker = thread / d.across;
  const int first = static_cast<int>(blockIdx.x) * d.across;
  const int neurons = smaller(smaller(*d.count, d.most) - first, d.across);
  if (neurons <= 0) return;
  const bool exists = thread % d.across < neurons;
  const int neuron = exists ? static_cast<int>(d.order[first + thread % d.across]) : 0;
  const T* const all_dy = d.dy + neuron * d.dy_strides.channel;
  const T* const all_x = d.x + neuron / d.per_input * d.x_strides.channel;
  const int taps = d.kernel_height * d.kernel_width;
  const int first_tap = static_cast<int>(blockIdx.z) * kSomeTaps;
  const UnitsOfPart units(d);

  float sums[kSomeTaps + 1] = {};
  const int workers = kDepthwiseThreads / d.across / d.columns;
  for (int unit = units.first + worker / d.columns; exists && unit < units.end; unit += workers) {
    const int64_t image = unit / d.out_height;
    const int p = unit % d.out_height;
    const T* const dy = all_dy + image * d.dy_strides.image + p * d.dy_strides.line;
    const T* const x = all_x + image * d.x_strides.image;
    for (int q = worker % d.columns; q < d.out_width; q += d.columns) {
      const float grad = to_float(dy[q * d.dy_strides.column]);
      sums[kSomeTaps] += grad;
#pragma unroll
      for (int i = 0; i < kSomeTaps; ++i) {
        const int tap = first_tap + i;
        const int h = p * d.stride_h - d.padding_h + tap / d.kernel_width * d.dilation_h;
        const int w = q * d.stride_w - d.padding_w + tap % d.kernel_width * d.dilation_w;
        if (tap >= taps || h < 0 || h >= d.height || w < 0 || w >= d.width) continue;
        sums[i] += grad * to_float(x[h * d.x_strides.line + w * d.x_strides.column]);
      }
    }
  }
  add_threads(sums, d.across, neurons, ptx::dynamic_shared(), [&](int i, int j, float sum) {
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * d.most + first + i;
    const int tap = first_tap + j;
    if (j == kSomeTaps) {
      if (first_tap == 0 && d.bias_parts != nullptr) d.bias_parts[slot] = sum;
    } else if (tap < taps) {
      d.parts[slot * taps + tap] = sum;
    }
  });
}

// --- second pass ---------------------------------------------------------------------------------

// `grad` is [k, taps].
template <class T>
struct DepthwiseFinish {
  const float* parts;
  const float* bias_parts;
  const int64_t* order;
  const int32_t* count;
  T* grad;
  T* bias;
  int64_t k;
  int taps, number_of_parts, most;
};

// Adds the parts, each warp of a block some of them; frozen neurons become 0.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_finish_kernel(DepthwiseFinish<T> f) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  const int64_t i = index / f.taps;
  const int tap = static_cast<int>(index % f.taps);
  const bool exists = index < f.k * f.taps, adds_bias = exists && f.bias != nullptr && tap == 0;
  float sum = 0, bias = 0;
  if (exists && i < *f.count) {
#pragma unroll 8
    for (int64_t part = warp; part < f.number_of_parts; part += kDepthwiseWarps) {
      sum += f.parts[(part * f.most + i) * f.taps + tap];
    }
    for (int64_t part = warp; adds_bias && part < f.number_of_parts; part += kDepthwiseWarps) {
      bias += f.bias_parts[part * f.most + i];
    }
  }
  auto* const of_warps = reinterpret_cast<float2*>(ptx::dynamic_shared());
  of_warps[threadIdx.x] = make_float2(sum, bias);
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int other = 1; other < kDepthwiseWarps; ++other) {
    sum += of_warps[other * kLanes + lane].x;
    bias += of_warps[other * kLanes + lane].y;
  }
  const int64_t neuron = f.order[i];
  f.grad[neuron * f.taps + tap] = from_float<T>(sum);
  if (adds_bias) f.bias[neuron] = from_float<T>(bias);
}

}  // namespace neq::cuda
