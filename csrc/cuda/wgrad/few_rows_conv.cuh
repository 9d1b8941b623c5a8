// Weight and bias gradients of few active channels of a 3 x 3 convolution without stride or
// dilation, in one pass over X:
//
//   sums[i, r, s, c] = sum over pixels of dY[n, order[i], h + padding - r, w + padding - s]
//                      * X[n, h, w, c]
//
// Each tap is a row of fragments of its own: what differs between taps is only which pixels of dY
// they read, and those lie in shared memory, with the border around a rectangle of X that all taps
// reach. Rectangles follow one another downwards, in stripes of X, and the last lines of dY that
// one has read stay for the next. Channels of both lie innermost; of dY only the active ones are
// read.
#pragma once

#include "tile_rules.h"
#include "wgrad_tile.cuh"

namespace neq::cuda {

constexpr int kTapsAcross = 3, kTaps = kTapsAcross * kTapsAcross;
// Lines, and columns, that a border has more than its rectangle.
constexpr int kReach = kTapsAcross - 1;
// Rectangles and their borders reach all of dY.
static_assert(kMostPadding <= kReach);

constexpr int kRectanglePixels = 32;

// kNeurons: 8 or 16, of which there is room in the border. kWidth: of a rectangle, 8 or 16. Wide
// ones read fewer columns of dY twice, narrow ones waste less at the right side of an image.
template <class T_, int kNeurons_, int kWarps_, int kWidth_>
struct FewRows {
  using T = T_;
  static constexpr int kNeurons = kNeurons_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kLanes;
  // Of a multiprocessor, which then has registers for them.
  static constexpr int kBlocksEach = kWarps > 8 ? 1 : 2;
  // Vectors of X are two steps under way, and elements of dY one, where blocks share the registers
  // and wait for each other's memory, or two.
  static constexpr int kStages = 3;
  static constexpr bool kOneStepAhead = kWarps == 8;
  static constexpr int kWarpColumns = 16, kFragments = kWarpColumns / kFragmentColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  static constexpr int kWidth = kWidth_, kHeight = kRectanglePixels / kWidth;
  static constexpr int kBorderWidth = kWidth + kReach, kBorderHeight = kHeight + kReach;
  static constexpr int kBorderPixels = kBorderWidth * kBorderHeight;
  // The border that is read, and all that may be written meanwhile.
  static constexpr int kRingLines = 2 * kBorderHeight;
  // For the tensor cores an odd number of vectors: neighbours lie in different banks.
  static constexpr int kDyVectors = kNeurons / kVector<T>;
  static constexpr int kDyPitch = (sizeof(T) == 2 ? kDyVectors | 1 : kDyVectors) * kVectorBytes;
  static constexpr int kLineBytes = kBorderWidth * kDyPitch;
  static constexpr int kXVectors = kColumns / kVector<T>;
  static constexpr int kXPitch = (kXVectors + 1) * kVectorBytes;
  static constexpr int kStageBytes = kRectanglePixels * kXPitch;
  static constexpr int kRingBytes = kRingLines * kLineBytes;
  // Where the ring begins, the threads' bias gradients lie at last.
  static constexpr int kStagesAt = kRingBytes > kThreads * 4 ? kRingBytes : kThreads * 4;
  static constexpr int kSharedBytes = kStagesAt + kStages * kStageBytes;
  static constexpr int kXRowsTogether = kThreads / kXVectors;
  static constexpr int kXRows = kRectanglePixels / kXRowsTogether;
  static constexpr int kDyPixelsTogether = kThreads / kNeurons;
  static constexpr int kDyElements = (kBorderPixels + kDyPixelsTogether - 1) / kDyPixelsTogether;
  static_assert(kSharedBytes <= kMostShared);
  static_assert(kFragmentRows % kWidth == 0);
  static_assert(kThreads % kXVectors == 0 && kRectanglePixels % kXRowsTogether == 0);
};

// Strides are in elements. `order` is null where neuron i is channel i of dY. `parts` is
// float[parts, most, 9, c] and `bias_parts` float[parts, most] or null, of whose `most` neurons,
// which are at most as many as the tile's, the first `count` are written.
template <class T>
struct FewRowsConv {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t image, line, column;  // of x
  const int64_t* order;
  const int32_t* count;
  float* parts;
  float* bias_parts;
  int64_t c;
  int images, height, width, out_height, out_width, padding_h, padding_w;
  int rectangles_per_part, most;
};

// A rectangle of X, and those that follow it: downwards, stripe by stripe, image by image.
template <class Tile>
class RectangleCursor {
 public:
  using Parameters = FewRowsConv<typename Tile::T>;

  __device__ __forceinline__ RectangleCursor(const Parameters& f, int rectangle) {
    const int down = (f.height + Tile::kHeight - 1) / Tile::kHeight;
    const int stripes = (f.width + Tile::kWidth - 1) / Tile::kWidth;
    const int stripe = rectangle / down;
    image = stripe / stripes;
    top = (rectangle - stripe * down) * Tile::kHeight;
    left = (stripe - image * stripes) * Tile::kWidth;
  }

  __device__ __forceinline__ void advance(const Parameters& f) {
    top += Tile::kHeight;
    if (top < f.height) return;
    top = 0;
    left += Tile::kWidth;
    if (left < f.width) return;
    left = 0;
    ++image;
  }

  int image, top, left;
};

// The border in shared memory, in a ring of lines. The lines of the next one follow.
template <class Tile>
struct Border {
  unsigned char* ring;
  int top = 0;

  __device__ __forceinline__ void advance(int lines) {
    top += lines;
    if (top >= Tile::kRingLines) top -= Tile::kRingLines;
  }
  __device__ __forceinline__ unsigned char* line(int down) const {
    const int at = top + down;
    return ring + (at < Tile::kRingLines ? at : at - Tile::kRingLines) * Tile::kLineBytes;
  }
};

// What the taps read of a border for a pixel; the last tap its upper left corner.
template <class Tile>
struct TapReads {
  const unsigned char* lines[kTapsAcross];

  // `at`: in bytes, in the border's pixels.
  __device__ __forceinline__ TapReads(const Border<Tile>& border, int down, int right, int at) {
#pragma unroll
    for (int i = 0; i < kTapsAcross; ++i) {
      lines[i] = border.line(down + i) + right * Tile::kDyPitch + at;
    }
  }
  __device__ __forceinline__ const unsigned char* read(int tap) const {
    return lines[kReach - tap / kTapsAcross] + (kReach - tap % kTapsAcross) * Tile::kDyPitch;
  }
};

// Adds the products of a fragment of pixels, from line `top` of the rectangle on.
template <class Tile>
__device__ __forceinline__ void multiply_taps(float (&sums)[kTaps][Tile::kFragments][4],
                                              const Border<Tile>& border, int top,
                                              const unsigned char* x_rows, int lane) {
  using T = typename Tile::T;
  if constexpr (sizeof(T) == 2) {
    static_assert(Tile::kFragments == 2);
    uint32_t x[4];
    ptx::ldmatrix_x4_trans(x, x_rows + lane % 16 * Tile::kXPitch + lane / 16 * kVectorBytes);
    // Matrices: of 16 neurons two to each half of the pixels, of 8 one.
    constexpr bool kAll = Tile::kNeurons == kWarpNeurons;
    const int pixel = kAll ? lane % 8 + lane / 16 * 8 : lane % 16;
    const TapReads<Tile> taps(border, top + pixel / Tile::kWidth, pixel % Tile::kWidth,
                              kAll ? lane / 8 % 2 * kVectorBytes : 0);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      uint32_t dy[4] = {};
      if constexpr (kAll) {
        ptx::ldmatrix_x4_trans(dy, taps.read(tap));
      } else {
        uint32_t halves[2];
        ptx::ldmatrix_x2_trans(halves, taps.read(tap));
        dy[0] = halves[0];
        dy[2] = halves[1];
      }
      ptx::mma_16816<T>(sums[tap][0], dy, {x[0], x[1]});
      ptx::mma_16816<T>(sums[tap][1], dy, {x[2], x[3]});
    }
  } else {
    const int neuron = lane / 4 * static_cast<int>(sizeof(T));
    const unsigned char* mine = x_rows + lane % 4 * static_cast<int>(sizeof(float2));
#pragma unroll 1
    for (int row = 0; row < kFragmentRows; ++row) {
      float2 x[Tile::kFragments];
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        x[f] = *reinterpret_cast<const float2*>(mine + row * Tile::kXPitch +
                                                f * kFragmentColumns * sizeof(T));
      }
      const TapReads<Tile> taps(border, top + row / Tile::kWidth, row % Tile::kWidth, neuron);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const auto* dy = reinterpret_cast<const float*>(taps.read(tap));
        const float first = dy[0], second = Tile::kNeurons > 8 ? dy[8] : 0.0f;
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
          sums[tap][f][0] += first * x[f].x;
          sums[tap][f][1] += first * x[f].y;
          sums[tap][f][2] += second * x[f].x;
          sums[tap][f][3] += second * x[f].y;
        }
      }
    }
  }
}

// Blocks: x for columns, y for parts of the rectangles.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksEach)
    few_rows_conv_kernel(FewRowsConv<typename Tile::T> f) {
  using T = typename Tile::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, warp_columns = thread / kLanes * Tile::kWarpColumns;
  const int first_column = static_cast<int>(blockIdx.x) * Tile::kColumns;
  const int neurons = smaller(*f.count, f.most);
  if (neurons <= 0) return;
  const int rectangles = f.images * ((f.height + Tile::kHeight - 1) / Tile::kHeight) *
                         ((f.width + Tile::kWidth - 1) / Tile::kWidth);
  const int first = static_cast<int>(blockIdx.y) * f.rectangles_per_part;
  const int steps = smaller(f.rectangles_per_part, rectangles - first);

  unsigned char* shared = ptx::dynamic_shared();
  unsigned char* const stages = shared + Tile::kStagesAt;
  Border<Tile> border{shared};

  // This thread takes one neuron, if it exists, of some pixels of the border. Lines that the
  // rectangle above has not read come first; the others are only read where there is none above.
  const int neuron = thread % Tile::kNeurons;
  int channel = neuron < neurons ? neuron : -1;
  if (channel >= 0 && f.order != nullptr) channel = static_cast<int>(f.order[neuron]);
  int down[Tile::kDyElements], right[Tile::kDyElements];
#pragma unroll
  for (int i = 0; i < Tile::kDyElements; ++i) {
    const int pixel = thread / Tile::kNeurons + i * Tile::kDyPixelsTogether;
    const int line = pixel / Tile::kBorderWidth;
    down[i] = line < Tile::kHeight ? line + kReach : line - Tile::kHeight;
    right[i] = pixel - line * Tile::kBorderWidth;
    // Behind the border: none of the lines that it has.
    if (pixel >= Tile::kBorderPixels) down[i] = -1;
  }
  const int x_vector = thread % Tile::kXVectors, x_row = thread / Tile::kXVectors;
  unsigned char* const copied_x = stages + x_row * Tile::kXPitch + x_vector * kVectorBytes;
  const int x_column = first_column + x_vector * kVector<T>;

  // What is under way from dY: the elements go through registers, because only they are wanted of
  // their vectors. Those in front of the first line or column lie in another rectangle's border
  // too, from which the bias gradient has them.
  struct Elements {
    T values[Tile::kDyElements];
    int first_line, first_column;
  };
  RectangleCursor<Tile> cursor(f, first);
  // Of the border the lines from `first_line` on, if the rectangle above has read the others.
  const auto start = [&](int stage, int first_line) {
    Elements elements;
    const int top = cursor.top + f.padding_h - kReach, left = cursor.left + f.padding_w - kReach;
    const int corner = (cursor.image * f.out_height + top) * f.out_width + left;
    elements.first_line = cursor.top == 0 ? 0 : kReach;
    elements.first_column = cursor.left == 0 ? 0 : kReach;
#pragma unroll
    for (int i = 0; i < Tile::kDyElements; ++i) {
      const bool take =
          channel >= 0 && down[i] >= smaller(elements.first_line, first_line) &&
          static_cast<unsigned>(top + down[i]) < static_cast<unsigned>(f.out_height) &&
          static_cast<unsigned>(left + right[i]) < static_cast<unsigned>(f.out_width);
      const int64_t pixel = corner + down[i] * f.out_width + right[i];
      elements.values[i] = take ? f.dy[pixel * f.dy_stride + channel] : from_float<T>(0);
    }
    const T* from =
        f.x + cursor.image * f.image + cursor.top * f.line + cursor.left * f.column + x_column;
#pragma unroll
    for (int i = 0; i < Tile::kXRows; ++i) {
      const int pixel = x_row + i * Tile::kXRowsTogether;
      const int x_down = pixel / Tile::kWidth, x_right = pixel % Tile::kWidth;
      const bool take =
          x_column < f.c && cursor.top + x_down < f.height && cursor.left + x_right < f.width;
      ptx::cp_async_16(copied_x + stage + i * Tile::kXRowsTogether * Tile::kXPitch,
                       take ? from + x_down * f.line + x_right * f.column : f.x, take);
    }
    cursor.advance(f);
    return elements;
  };
  float bias = 0;
  // Makes the elements' border the one that is read next. Neurons that do not exist are 0.
  const auto store = [&](const Elements& elements, int first_line) {
    first_line = smaller(elements.first_line, first_line);
    border.advance(Tile::kBorderHeight - first_line);
#pragma unroll
    for (int i = 0; i < Tile::kDyElements; ++i) {
      if (down[i] < first_line) continue;
      auto* to = border.line(down[i]) + right[i] * Tile::kDyPitch;
      reinterpret_cast<T*>(to)[neuron] = elements.values[i];
      if (down[i] >= elements.first_line && right[i] >= elements.first_column) {
        bias += to_float(elements.values[i]);
      }
    }
  };
  const auto next = [](int stage) {
    return stage == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : stage + Tile::kStageBytes;
  };

  float sums[kTaps][Tile::kFragments][4] = {};
  int read = 0;
  Elements stored{}, waiting{};
  static_assert(Tile::kStages == 3);
  if (steps > 0) stored = start(read, 0);
  ptx::cp_async_commit();
  if (steps > 1) waiting = start(next(read), kReach);
  ptx::cp_async_commit();
  if (steps > 0) store(stored, 0);
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const Border<Tile> current = border;
    if (Tile::kOneStepAhead && left > 1) store(waiting, kReach);
    Elements started{};
    if (left >= Tile::kStages) started = start(next(next(read)), kReach);
    ptx::cp_async_commit();
    const unsigned char* x_rows = stages + read + warp_columns * sizeof(T);
    // One after the other: there are registers for one fragment.
#pragma unroll 1
    for (int pixel = 0; pixel < kRectanglePixels; pixel += kFragmentRows) {
      multiply_taps<Tile>(sums, current, pixel / Tile::kWidth, x_rows + pixel * Tile::kXPitch,
                          lane);
    }
    read = next(read);
    if (!Tile::kOneStepAhead && left > 1) store(waiting, kReach);
    waiting = started;
  }

  if (f.bias_parts != nullptr && blockIdx.x == 0) {
    auto* of_threads = reinterpret_cast<float*>(shared);
    __syncthreads();
    of_threads[thread] = bias;
    __syncthreads();
    if (thread < neurons) {
      for (int i = 1; i < Tile::kDyPixelsTogether; ++i) {
        bias += of_threads[i * Tile::kNeurons + thread];
      }
      f.bias_parts[static_cast<int64_t>(blockIdx.y) * f.most + thread] = bias;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (row >= neurons) continue;
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * f.most + row;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float* to = f.parts + (slot * kTaps + tap) * f.c;
#pragma unroll
      for (int fragment = 0; fragment < Tile::kFragments; ++fragment) {
        const int column = first_column + warp_columns + fragment * kFragmentColumns + lane % 4 * 2;
        if (column >= f.c) continue;
        const float* sum = sums[tap][fragment];
        *reinterpret_cast<float2*>(to + column) = make_float2(sum[2 * i], sum[2 * i + 1]);
      }
    }
  }
}

}  // namespace neq::cuda
