// Weight gradient of few active channels of a 3 x 3 convolution without stride or dilation, in one
// pass over X:
//
//   sums[i, r, s, c] = sum over pixels of dY[n, i, h + padding - r, w + padding - s] * X[n, h, w,
//   c]
//
// Each tap is a row of fragments of its own: what differs between taps is only which pixels of dY
// they read, and those lie in shared memory, with the border around a rectangle of X that all taps
// reach. dY is packed (see pack.cuh), and channels of both lie innermost.
#pragma once

#include "wgrad_tile.cuh"

namespace neq::cuda {

constexpr int kTapsAcross = 3, kTaps = kTapsAcross * kTapsAcross;
constexpr int kTileHeight = 4, kTileWidth = 8, kTilePixels = kTileHeight * kTileWidth;
constexpr int kBorderWidth = kTileWidth + kTapsAcross - 1;
constexpr int kBorderPixels = (kTileHeight + kTapsAcross - 1) * kBorderWidth;

// kNeurons: 8 or 16, what is packed for a pixel.
template <class T_, int kNeurons_, int kWarps_>
struct FewRows {
  using T = T_;
  static constexpr int kNeurons = kNeurons_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kLanes, kStages = 3;
  static constexpr int kWarpColumns = 16, kFragments = kWarpColumns / kFragmentColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  // An odd number of vectors: pixels that are neighbours lie in different banks.
  static constexpr int kDyVectors = kNeurons / kVector<T>;
  static constexpr int kDyPitch = (kDyVectors | 1) * kVectorBytes;
  static constexpr int kXVectors = kColumns / kVector<T>;
  static constexpr int kXPitch = (kXVectors + 1) * kVectorBytes;
  static constexpr int kXAt = kBorderPixels * kDyPitch;
  static constexpr int kStageBytes = kXAt + kTilePixels * kXPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kXRowsTogether = kThreads / kXVectors;
  static constexpr int kXRows = kTilePixels / kXRowsTogether;
  static constexpr int kDyCopies = (kBorderPixels * kDyVectors + kThreads - 1) / kThreads;
  static_assert(kSharedBytes <= kMostShared);
  static_assert(kThreads % kXVectors == 0 && kTilePixels % kXRowsTogether == 0);
};

// Strides are in elements. `parts` is float[parts, most, 9, c], of whose `most` neurons the first
// `count` are written. `dy` has as many channels as the tile has neurons, at least `most`.
template <class T>
struct FewRowsConv {
  const T* dy;
  const T* x;
  int64_t image, line, column;  // of x
  const int32_t* count;
  float* parts;
  int64_t c;
  int images, height, width, out_height, out_width, padding_h, padding_w;
  int tiles_per_part, most;
};

// A rectangle of X, and the next ones row by row.
class TileCursor {
 public:
  template <class Parameters>
  __device__ __forceinline__ TileCursor(const Parameters& f, int tile)
      : down_((f.height + kTileHeight - 1) / kTileHeight),
        across_((f.width + kTileWidth - 1) / kTileWidth) {
    image = tile / (down_ * across_);
    const int rest = tile - image * down_ * across_;
    top = rest / across_ * kTileHeight;
    left = rest % across_ * kTileWidth;
  }

  __device__ __forceinline__ void advance() {
    left += kTileWidth;
    if (left < across_ * kTileWidth) return;
    left = 0;
    top += kTileHeight;
    if (top < down_ * kTileHeight) return;
    top = 0;
    ++image;
  }

  int image, top, left;

 private:
  int down_, across_;
};

// Adds the products of a fragment of pixels, two rows of the rectangle. `border` is where the pixel
// lies that the last tap reads for the first of them.
template <class Tile>
__device__ __forceinline__ void multiply_taps(float (&sums)[kTaps][Tile::kFragments][4],
                                              const unsigned char* border,
                                              const unsigned char* x_rows, int lane) {
  using T = typename Tile::T;
  const auto of_tap = [&](int tap) {
    const int pixel =
        (kTapsAcross - 1 - tap / kTapsAcross) * kBorderWidth + kTapsAcross - 1 - tap % kTapsAcross;
    return border + pixel * Tile::kDyPitch;
  };
  const auto pixel_at = [](int row) {
    return (row / kTileWidth * kBorderWidth + row % kTileWidth) * Tile::kDyPitch;
  };
  if constexpr (sizeof(T) == 2) {
    static_assert(Tile::kFragments == 2);
    uint32_t x[4];
    ptx::ldmatrix_x4_trans(x, x_rows + lane % 16 * Tile::kXPitch + lane / 16 * kVectorBytes);
    // Matrices: of 16 neurons two to each half of the pixels, of 8 one.
    constexpr bool kAll = Tile::kNeurons == kWarpNeurons;
    const int at = kAll ? pixel_at(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * kVectorBytes
                        : pixel_at(lane % 16);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      uint32_t dy[4] = {};
      if constexpr (kAll) {
        ptx::ldmatrix_x4_trans(dy, of_tap(tap) + at);
      } else {
        uint32_t halves[2];
        ptx::ldmatrix_x2_trans(halves, of_tap(tap) + at);
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
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const auto* dy = reinterpret_cast<const float*>(of_tap(tap) + pixel_at(row) + neuron);
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
__global__ void __launch_bounds__(Tile::kThreads)
    few_rows_conv_kernel(FewRowsConv<typename Tile::T> f) {
  using T = typename Tile::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, warp_columns = thread / kLanes * Tile::kWarpColumns;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * Tile::kColumns;
  const int neurons = smaller(*f.count, f.most);
  if (neurons <= 0) return;
  const int tiles = f.images * ((f.height + kTileHeight - 1) / kTileHeight) *
                    ((f.width + kTileWidth - 1) / kTileWidth);
  const int first = static_cast<int>(blockIdx.y) * f.tiles_per_part;
  const int steps = smaller(f.tiles_per_part, tiles - first);

  unsigned char* shared = ptx::dynamic_shared();
  // What this thread copies, from the corner of a rectangle on.
  int dy_down[Tile::kDyCopies], dy_right[Tile::kDyCopies], dy_to[Tile::kDyCopies];
#pragma unroll
  for (int i = 0; i < Tile::kDyCopies; ++i) {
    const int copied = thread + i * Tile::kThreads;
    const int pixel = copied / Tile::kDyVectors, vector = copied % Tile::kDyVectors;
    dy_down[i] = pixel / kBorderWidth + f.padding_h - (kTapsAcross - 1);
    dy_right[i] = pixel % kBorderWidth + f.padding_w - (kTapsAcross - 1);
    dy_to[i] = pixel < kBorderPixels ? pixel * Tile::kDyPitch + vector * kVectorBytes : -1;
  }
  const T* dy = f.dy + thread % Tile::kDyVectors * kVector<T>;
  const int x_vector = thread % Tile::kXVectors, x_row = thread / Tile::kXVectors;
  const int x_to = Tile::kXAt + x_row * Tile::kXPitch + x_vector * kVectorBytes;
  const bool takes_x = first_column + x_vector * kVector<T> < f.c;
  const T* x = f.x + first_column + x_vector * kVector<T>;
  TileCursor cursor(f, first);
  const auto copy = [&](unsigned char* stage) {
    const int corner = (cursor.image * f.out_height + cursor.top) * f.out_width + cursor.left;
#pragma unroll
    for (int i = 0; i < Tile::kDyCopies; ++i) {
      if (dy_to[i] < 0) break;
      const int p = cursor.top + dy_down[i], q = cursor.left + dy_right[i];
      const bool take = static_cast<unsigned>(p) < static_cast<unsigned>(f.out_height) &&
                        static_cast<unsigned>(q) < static_cast<unsigned>(f.out_width);
      const int64_t pixel = corner + dy_down[i] * f.out_width + dy_right[i];
      ptx::cp_async_16(stage + dy_to[i], take ? dy + pixel * Tile::kNeurons : f.dy, take);
    }
    const T* from = x + cursor.image * f.image + cursor.top * f.line + cursor.left * f.column;
#pragma unroll
    for (int i = 0; i < Tile::kXRows; ++i) {
      const int row = x_row + i * Tile::kXRowsTogether;
      const int down = row / kTileWidth, right = row % kTileWidth;
      const bool take = takes_x && cursor.top + down < f.height && cursor.left + right < f.width;
      ptx::cp_async_16(stage + x_to + i * Tile::kXRowsTogether * Tile::kXPitch,
                       take ? from + down * f.line + right * f.column : f.x, take);
    }
    cursor.advance();
  };
  const auto next = [&](unsigned char* stage) {
    return stage == shared + (Tile::kStages - 1) * Tile::kStageBytes ? shared
                                                                     : stage + Tile::kStageBytes;
  };

  float sums[kTaps][Tile::kFragments][4] = {};
  unsigned char *written = shared, *read = shared;
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) copy(written);
    ptx::cp_async_commit();
    written = next(written);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    if (step + Tile::kStages - 1 < steps) copy(written);
    ptx::cp_async_commit();
    written = next(written);
    const unsigned char* x_rows = read + Tile::kXAt + warp_columns * sizeof(T);
#pragma unroll
    for (int row = 0; row < kTilePixels; row += kFragmentRows) {
      multiply_taps<Tile>(sums, read + row / kTileWidth * kBorderWidth * Tile::kDyPitch,
                          x_rows + row * Tile::kXPitch, lane);
    }
    read = next(read);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int neuron = lane / 4 + 8 * i;
    if (neuron >= neurons) continue;
    const int64_t slot = static_cast<int64_t>(blockIdx.y) * f.most + neuron;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float* to = f.parts + (slot * kTaps + tap) * f.c;
#pragma unroll
      for (int fragment = 0; fragment < Tile::kFragments; ++fragment) {
        const int64_t column =
            first_column + warp_columns + fragment * kFragmentColumns + lane % 4 * 2;
        if (column >= f.c) continue;
        const float* sum = sums[tap][fragment];
        *reinterpret_cast<float2*>(to + column) = make_float2(sum[2 * i], sum[2 * i + 1]);
      }
    }
  }
}

}  // namespace neq::cuda
