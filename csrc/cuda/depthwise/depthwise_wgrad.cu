#include <algorithm>
#include <climits>

#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "any_kernel.cuh"
#include "finish.cuh"
#include "planes.cuh"
#include "rows.cuh"

namespace neq::cuda {
namespace {

// Of planes in shared memory: what a band may have, the bands of a stage wish for, and all stages
// may have where a band cannot be less.
constexpr int kBandBytes = 24 << 10, kPlaneStageBytes = 12 << 10, kMostPlaneBytes = 60 << 10;
// A part is to read so much more than it costs: its sums, written and read again, and the indices
// of its neurons. Where channels lie innermost it reads those of frozen neurons besides.
constexpr int kLeastGainOfPlanes = 8, kLeastGainOfRows = 4;
// Rows are not divided into bands of less than so many times what neighbouring bands both read.
constexpr int kHaloShare = 3;

// The least power of 2 that is not below `number`, or `most`.
int power_of_two(int64_t number, int most) {
  int power = 1;
  while (power < number && power < most) power *= 2;
  return power;
}

// Whether all pixels start at multiples of 16 bytes, and end there.
template <class T>
bool is_of_vectors(const T* images, const ImageStrides& strides, int channels) {
  const int64_t elements = strides.image | strides.line | strides.column | channels;
  return reinterpret_cast<uintptr_t>(images) % kVectorBytes == 0 && elements % kVector<T> == 0;
}

// `call` with the kernel's Taps, or without where only depthwise_any_kernel supports it.
template <class T, class Call, class Otherwise>
auto with_taps(const int32_t* geometry, const Call& call, const Otherwise& otherwise) {
  const int32_t *kernel = geometry + 4, *stride = geometry + 6, *padding = geometry + 8;
  const int32_t* dilation = geometry + 10;
  const bool is_square = kernel[0] == kernel[1] && stride[0] == stride[1];
  if (!is_square || stride[0] > 2 || dilation[0] != 1 || dilation[1] != 1) return otherwise();
  // Rows of the padding alone are no band of an image.
  if (padding[0] >= kernel[0]) return otherwise();
  switch (10 * kernel[0] + stride[0]) {
    case 31:
      return call(Taps<T, 3, 1>{});
    case 32:
      return call(Taps<T, 3, 2>{});
    case 51:
      return call(Taps<T, 5, 1>{});
    case 52:
      return call(Taps<T, 5, 2>{});
    case 71:
      return call(Taps<T, 7, 1>{});
    case 72:
      return call(Taps<T, 7, 2>{});
    default:
      return otherwise();
  }
}

// Of one band in shared memory.
template <class Taps>
int64_t band_bytes(const int32_t* geometry, int64_t rows) {
  using T = typename Taps::T;
  const int64_t x_rows = (rows - 1) * Taps::kStride + Taps::kSide;
  const int64_t dy = rows * geometry[3], x = smaller<int64_t>(x_rows, geometry[0]) * geometry[1];
  return (dy / kVector<T> + x / kVector<T> + 4) * kVectorBytes;
}

// Threads beside each other.
int plane_threads(const int32_t* geometry) {
  return static_cast<int>(ceil_div(geometry[3], kPlaneOutputs));
}

// Of `per_part` bands: as many as have columns for each thread.
template <class Taps>
int bands_together(const int32_t* geometry, int rows, int per_part) {
  const int64_t fit = kPlaneStageBytes / band_bytes<Taps>(geometry, rows);
  const int64_t busy = std::min(kDepthwiseThreads / plane_threads(geometry), per_part);
  return static_cast<int>(std::max<int64_t>(1, std::min(fit, busy)));
}

// How many parts there are of `pixels` output pixels, at most: a block's sums of so many neurons
// are written together.
template <class T>
int64_t most_parts(int64_t pixels, int taps, int neurons, int least_gain) {
  const int64_t sums = 2 * static_cast<int64_t>(sizeof(float)) * (taps + 1) * neurons;
  const int64_t cost = sums + 4 * kSectorBytes;
  return std::max<int64_t>(1, 2 * pixels * neurons * sizeof(T) / (least_gain * cost));
}

template <class T>
cudaError_t launch_any(Depthwise<T> d, dim3 grid, void* stream) {
  d.units = d.images * d.out_height;
  d.per_part = static_cast<int>(ceil_div(d.units, grid.y));
  const int taps = d.kernel_height * d.kernel_width;
  grid.z = static_cast<unsigned>(ceil_div(taps, kSomeTaps));
  return launch(depthwise_any_kernel<T>, grid, kDepthwiseThreads, kSumsShared<kSomeTaps + 1>,
                stream, d);
}

}  // namespace
}  // namespace neq::cuda

extern "C" {

NeqDepthwiseCut neq_cuda_depthwise_cut(int32_t dtype, const int32_t* geometry, int32_t images,
                                       int32_t most, int32_t channels_inside, int32_t blocks) {
  using namespace neq::cuda;
  const int out_height = geometry[2];
  NeqDepthwiseCut cut{out_height, 1};
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int across = channels_inside != 0 ? std::min(most, kRowNeurons) : 1;
    const int64_t pixels = static_cast<int64_t>(images) * out_height * geometry[3];
    const int64_t wanted = smaller<int64_t>(ceil_div(blocks, ceil_div(most, across)), 65535);
    const int64_t at_most = std::min(
        wanted, most_parts<T>(pixels, geometry[4] * geometry[5], across,
                              channels_inside != 0 ? kLeastGainOfRows : kLeastGainOfPlanes));
    const auto divide = [&](int64_t units) {
      units = std::max<int64_t>(1, units);
      cut.parts = static_cast<int32_t>(ceil_div(units, ceil_div(units, at_most)));
      return cudaSuccess;
    };
    // Bands of fewer rows where there are far too few, and `units(rows)` units then.
    const auto choose = [&](auto taps, const auto& units) {
      using Chosen = decltype(taps);
      constexpr int kHalo = Chosen::kSide - Chosen::kStride;
      while (2 * units(cut.rows) < at_most &&
             cut.rows / 2 * Chosen::kStride >= kHaloShare * kHalo) {
        cut.rows = static_cast<int32_t>(ceil_div(cut.rows, 2));
      }
      return divide(units(cut.rows));
    };
    const auto of_taps = [&](auto taps) {
      using Chosen = decltype(taps);
      const auto bands = [&](int rows) { return images * ceil_div(out_height, rows); };
      if (channels_inside != 0) {
        const int64_t strips = ceil_div(geometry[3], Chosen::kOutputs);
        return choose(taps, [&](int rows) {
          return ceil_div(bands(rows) * strips, kDepthwiseThreads / across);
        });
      }
      int per_image = 1;
      while (per_image < out_height &&
             band_bytes<Chosen>(geometry, ceil_div(out_height, per_image)) > kBandBytes) {
        ++per_image;
      }
      cut.rows = static_cast<int32_t>(ceil_div(out_height, per_image));
      return choose(taps, bands);
    };
    return with_taps<T>(geometry, of_taps,
                        [&] { return divide(static_cast<int64_t>(images) * out_height); });
  });
  return cut;
}

int neq_cuda_depthwise_wgrad(int32_t dtype, const void* dy, const int64_t* dy_strides,
                             const void* x, const int64_t* x_strides, const int32_t* geometry,
                             const int64_t* order, const int32_t* count, float* parts,
                             float* bias_parts, int32_t images, int32_t k, int32_t channels,
                             int32_t rows, int32_t number_of_parts, int32_t most, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* g = geometry;
    const int64_t units = static_cast<int64_t>(images) * g[2] * g[3];
    if (rows < 1 || number_of_parts < 1 || channels < 1 || units > INT_MAX)
      return cudaErrorInvalidValue;
    Depthwise<T> d{};
    d.dy = static_cast<const T*>(dy);
    d.x = static_cast<const T*>(x);
    d.dy_strides = {dy_strides[0], dy_strides[1], dy_strides[2], dy_strides[3]};
    d.x_strides = {x_strides[0], x_strides[1], x_strides[2], x_strides[3]};
    d.order = order;
    d.count = count;
    d.parts = parts;
    d.bias_parts = bias_parts;
    d.images = images;
    d.height = g[0], d.width = g[1], d.out_height = g[2], d.out_width = g[3];
    d.kernel_height = g[4], d.kernel_width = g[5], d.stride_h = g[6], d.stride_w = g[7];
    d.padding_h = g[8], d.padding_w = g[9], d.dilation_h = g[10], d.dilation_w = g[11];
    d.per_input = k / channels;
    d.most = most;
    d.rows = rows;
    d.bands = static_cast<int>(ceil_div(d.out_height, rows));
    const bool channels_inside = d.dy_strides.channel == 1 && d.x_strides.channel == 1;
    const bool pixels_inside = d.dy_strides.column == 1 && d.x_strides.column == 1 &&
                               d.dy_strides.line == d.out_width && d.x_strides.line == d.width;
    d.across = channels_inside ? kRowNeurons : 1;
    dim3 grid(static_cast<unsigned>(ceil_div(most, d.across)),
              static_cast<unsigned>(number_of_parts));
    const auto any = [&] {
      d.across = channels_inside ? power_of_two(most, kLanes) : 1;
      grid.x = static_cast<unsigned>(ceil_div(most, d.across));
      d.columns = channels_inside ? 1 : power_of_two(d.out_width, kDepthwiseThreads);
      return launch_any(d, grid, stream);
    };
    return with_taps<T>(
        g,
        [&](auto taps) {
          using Chosen = decltype(taps);
          constexpr int kSums = kSumsShared<Chosen::kNumber + 1>;
          if (channels_inside && is_of_vectors(d.dy, d.dy_strides, k) &&
              is_of_vectors(d.x, d.x_strides, channels)) {
            constexpr int kRows = Chosen::kStages * Chosen::kStageBytes;
            static_assert(kSums <= kRows);
            return launch(depthwise_rows_kernel<Chosen>, grid, kDepthwiseThreads,
                          sizeof(BlockChannels) + kRows, stream, d);
          }
          d.units = d.images * d.bands;
          d.per_part = static_cast<int>(ceil_div(d.units, number_of_parts));
          d.together = bands_together<Chosen>(g, rows, d.per_part);
          const int64_t stages = kPlaneStages * d.together * band_bytes<Chosen>(g, rows);
          if (channels_inside || !pixels_inside || stages > kMostPlaneBytes) return any();
          // A piece of a column has some rows more to go down.
          const int pieces = std::min(kDepthwiseThreads / (d.together * plane_threads(g)),
                                      rows / (Chosen::kDepth + 1));
          d.pieces = std::max(1, pieces);
          const int64_t shared = kVectorBytes + std::max<int64_t>(kSums, stages);
          return launch(depthwise_planes_kernel<Chosen>, grid, kDepthwiseThreads,
                        static_cast<size_t>(shared), stream, d);
        },
        any);
  });
}

int neq_cuda_depthwise_finish(int32_t dtype, const float* parts, const float* bias_parts,
                              const int64_t* order, const int32_t* count, void* grad, void* bias,
                              int64_t k, int32_t taps, int32_t number_of_parts, int32_t most,
                              void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const DepthwiseFinish<T> f{
        parts, bias_parts, order,           count, static_cast<T*>(grad), static_cast<T*>(bias),
        k,     taps,       number_of_parts, most};
    return launch(depthwise_finish_kernel<T>,
                  dim3(static_cast<unsigned>(ceil_div(k * taps, kLanes))), kDepthwiseThreads,
                  kDepthwiseThreads * sizeof(float2), stream, f);
  });
}

}  // extern "C"
