// Weight and bias gradients of the active neurons of linear layers and convolutions, in parts.
#pragma once

#include "wgrad_tile.cuh"

namespace neq::cuda {

// Rows of X one after the other.
template <class T>
struct MatrixRows {
  const T* x;
  int64_t stride;

  void set_step(int) {}

  struct Tap {
    __device__ __forceinline__ Tap(const MatrixRows&, int) {}
  };

  class Cursor {
   public:
    Cursor() = default;
    __device__ __forceinline__ Cursor(const MatrixRows& rows, int64_t t)
        : at_(rows.x + t * rows.stride) {}
    __device__ __forceinline__ const T* row(const MatrixRows&, const Tap&) const { return at_; }
    template <int kRows>
    __device__ __forceinline__ void advance(const MatrixRows& rows) {
      at_ += kRows * rows.stride;
    }

   private:
    const T* at_;
  };
};

// Row t is the pixel of X that a tap of output pixel t reads; null outside of the image. Channels
// lie innermost. Pixels are numbered in 31 bits.
template <class T>
struct PixelRows {
  const T* x;
  int64_t image, line, column;  // strides
  int height, width, out_height, out_width, kernel_width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  // From a pixel to the one that a tile's rows further on: images, lines and columns.
  int step_n, step_p, step_q;

  void set_step(int rows) {
    step_q = rows % out_width;
    step_p = rows / out_width % out_height;
    step_n = rows / out_width / out_height;
  }

  // Of output pixel (0, 0) it reads this pixel.
  struct Tap {
    int h, w;

    __device__ __forceinline__ Tap(const PixelRows& rows, int tap) {
      const int down = tap / rows.kernel_width;
      h = down * rows.dilation_h - rows.padding_h;
      w = (tap - down * rows.kernel_width) * rows.dilation_w - rows.padding_w;
    }
  };

  class Cursor {
   public:
    Cursor() = default;
    __device__ __forceinline__ Cursor(const PixelRows& rows, int64_t t) {
      const auto pixel = static_cast<int>(t), line = pixel / rows.out_width;
      n_ = line / rows.out_height;
      p_ = line - n_ * rows.out_height;
      q_ = pixel - line * rows.out_width;
    }
    __device__ __forceinline__ const T* row(const PixelRows& rows, const Tap& tap) const {
      const int h = p_ * rows.stride_h + tap.h, w = q_ * rows.stride_w + tap.w;
      if (h < 0 || h >= rows.height || w < 0 || w >= rows.width) return nullptr;
      return rows.x + n_ * rows.image + h * rows.line + w * rows.column;
    }
    template <int kRows>
    __device__ __forceinline__ void advance(const PixelRows& rows) {
      q_ += rows.step_q;
      p_ += rows.step_p;
      n_ += rows.step_n;
      if (q_ >= rows.out_width) {
        q_ -= rows.out_width;
        ++p_;
      }
      if (p_ >= rows.out_height) {
        p_ -= rows.out_height;
        ++n_;
      }
    }

   private:
    int n_, p_, q_;
  };
};

// Sizes are in elements. `parts` is float[parts, most, taps, c], `bias_parts` float[parts, most] or
// null; of `most` neurons the first `count` are written. All rows start at multiples of 16 bytes.
template <class T, class Rows>
struct Wgrad {
  const T* dy;
  int64_t dy_stride;
  Rows x;
  const int64_t* order;
  const int32_t* count;
  float* parts;
  float* bias_parts;
  int64_t t, t_per_part, c;
  int most;
};

// Blocks: x for columns and taps, y for neurons, z for parts of the rows.
template <class Tile, class Rows>
__global__ void __launch_bounds__(Tile::kThreads, 2) wgrad_kernel(Wgrad<typename Tile::T, Rows> w) {
  using T = typename Tile::T;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, warp = thread / kLanes;
  const int warp_neurons = warp / Tile::kWarpsAcross * kWarpNeurons;
  const int warp_columns = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
  const int column_tiles = static_cast<int>((w.c + Tile::kColumns - 1) / Tile::kColumns);
  const int tap = static_cast<int>(blockIdx.x) / column_tiles, taps = gridDim.x / column_tiles;
  const int64_t first_column =
      static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(column_tiles)) * Tile::kColumns;
  const int first_neuron = static_cast<int>(blockIdx.y) * Tile::kNeurons;
  const int active = smaller(*w.count, w.most);
  const int neurons = smaller(active - first_neuron, Tile::kNeurons);
  if (neurons <= 0) return;

  const int64_t first = blockIdx.z * w.t_per_part;
  // Rows left to copy.
  int left = static_cast<int>(smaller(w.t_per_part, w.t - first));
  const int steps = (left + Tile::kRows - 1) / Tile::kRows;

  unsigned char* shared = ptx::dynamic_shared();
  const int dy_vector = thread % Tile::kDyVectors, dy_row = thread / Tile::kDyVectors;
  int64_t dy_at = first_neuron + dy_vector * kVector<T>;
  bool takes_dy = dy_at < active;
  int at[2] = {0, 0};
  if constexpr (Tile::kGathered) {
    auto& slots =
        *reinterpret_cast<Slots<Tile::kNeurons>*>(shared + Tile::kStages * Tile::kStageBytes);
    find_slots<T>(w.order + first_neuron, neurons, slots);
    takes_dy = dy_vector < slots.count;
    dy_at = takes_dy ? slots.vector[dy_vector] * kVector<T> : 0;
    for (int i = 0; i < 2; ++i) at[i] = slots.at[warp_neurons + lane / 4 + 8 * i];
  }
  const T* dy = w.dy + (first + dy_row) * w.dy_stride + dy_at;
  const int x_vector = thread % Tile::kXVectors, x_row = thread / Tile::kXVectors;
  const int64_t x_at = first_column + x_vector * kVector<T>;
  const bool takes_x = x_at < w.c;
  const typename Rows::Tap read_by(w.x, tap);
  typename Rows::Cursor x[Tile::kXRows];
#pragma unroll
  for (int i = 0; i < Tile::kXRows; ++i) {
    x[i] = typename Rows::Cursor(w.x, first + x_row + i * Tile::kXRowsTogether);
  }

  unsigned char* const copied = shared + dy_row * Tile::kDyPitch + dy_vector * kVectorBytes;
  unsigned char* const copied_x =
      shared + Tile::kXAt + x_row * Tile::kXPitch + x_vector * kVectorBytes;
  // Copies the next rows to the stage that lies `to` bytes from the first.
  const auto copy = [&](int to) {
#pragma unroll
    for (int i = 0; i < Tile::kDyRows; ++i) {
      const int row = i * Tile::kDyRowsTogether;
      if (Tile::kDyRowsTogether > Tile::kRows && dy_row >= Tile::kRows) break;
      const bool take = takes_dy && dy_row + row < left;
      ptx::cp_async_16(copied + to + row * Tile::kDyPitch, take ? dy + row * w.dy_stride : w.dy,
                       take);
    }
    dy += Tile::kRows * w.dy_stride;
#pragma unroll
    for (int i = 0; i < Tile::kXRows; ++i) {
      const int row = i * Tile::kXRowsTogether;
      const T* from = takes_x && x_row + row < left ? x[i].row(w.x, read_by) : nullptr;
      ptx::cp_async_16(copied_x + to + row * Tile::kXPitch, from == nullptr ? w.x.x : from + x_at,
                       from != nullptr);
      x[i].template advance<Tile::kRows>(w.x);
    }
    left -= Tile::kRows;
  };
  const auto next = [](int stage) {
    return stage == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : stage + Tile::kStageBytes;
  };

  float sums[Tile::kFragments][4] = {};
  float bias[4] = {};
  const bool adds_bias = w.bias_parts != nullptr && blockIdx.x == 0 && warp_columns == 0;
  int written = 0, read = 0;
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
    if (left > 0) copy(written);
    ptx::cp_async_commit();
    written = next(written);
    const unsigned char* dy_rows = shared + read;
    const unsigned char* x_rows = dy_rows + Tile::kXAt + warp_columns * sizeof(T);
    read = next(read);
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kFragmentRows) {
      typename Products<T>::Neurons a;
      const unsigned char* rows = dy_rows + row * Tile::kDyPitch;
      if constexpr (Tile::kGathered) {
        a = Products<T>::gathered(rows, Tile::kDyPitch, at, lane);
      } else {
        a = Products<T>::packed(rows + warp_neurons * sizeof(T), Tile::kDyPitch, lane);
      }
      if (adds_bias) Products<T>::add_to(bias, a, lane);
      Products<T>::multiply(sums, a, x_rows + row * Tile::kXPitch, Tile::kXPitch, lane);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int neuron = warp_neurons + lane / 4 + 8 * i;
    if (neuron >= neurons) continue;
    const int64_t slot = static_cast<int64_t>(blockIdx.z) * w.most + first_neuron + neuron;
    if (adds_bias && lane % 4 == 0) w.bias_parts[slot] = bias[2 * i];
    float* to = w.parts + (slot * taps + tap) * w.c;
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) {
      const int64_t column = first_column + warp_columns + f * kFragmentColumns + lane % 4 * 2;
      if (column >= w.c) continue;
      *reinterpret_cast<float2*>(to + column) = make_float2(sums[f][2 * i], sums[f][2 * i + 1]);
    }
  }
}

}  // namespace neq::cuda
