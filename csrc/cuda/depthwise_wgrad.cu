#include <algorithm>
#include <climits>

#include "depthwise_wgrad.cuh"
#include "dtypes.cuh"
#include "launch.cuh"

namespace neq::cuda {
namespace {

constexpr int kBandBytes = 24 << 10, kTileBytes = 32 << 10, kMostTileBytes = 96 << 10;
constexpr int kLeastRows = 8;
// Columns of a strip are told apart in 32 bits.
constexpr int64_t kMostColumnStride = INT_MAX / 64;

// The least power of 2 that is not below `number`, or `most`.
int power_of_two(int64_t number, int most) {
  int power = 1;
  while (power < number && power < most) power *= 2;
  return power;
}

// `call` with the kernel's Taps, or without where only depthwise_any_kernel serves.
template <class T, class Call, class Otherwise>
auto with_taps(const int32_t* geometry, const Call& call, const Otherwise& otherwise) {
  const int32_t *kernel = geometry + 4, *stride = geometry + 6, *dilation = geometry + 10;
  const bool is_square = kernel[0] == kernel[1] && stride[0] == stride[1];
  if (!is_square || stride[0] > 2 || dilation[0] != 1 || dilation[1] != 1) return otherwise();
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

template <class Taps>
int bands_together(const int32_t* geometry, int rows) {
  const int64_t fit = kTileBytes / band_bytes<Taps>(geometry, rows);
  const int64_t busy = kDepthwiseThreads / geometry[3];
  return static_cast<int>(fit < busy ? (fit < 1 ? 1 : fit) : (busy < 1 ? 1 : busy));
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
    // How many blocks there can be for each `across` neurons.
    const int across = channels_inside != 0 ? power_of_two(most, kLanes) : 1;
    const int64_t wanted = smaller<int64_t>(ceil_div(blocks, ceil_div(most, across)), 65535);
    const auto choose = [&](const auto& most_parts) {
      while (most_parts(cut.rows) < wanted && cut.rows > kLeastRows) {
        cut.rows = static_cast<int32_t>(ceil_div(cut.rows, 2));
      }
      const int64_t parts = smaller(wanted, most_parts(cut.rows));
      cut.parts = parts < 1 ? 1 : static_cast<int32_t>(parts);
      return cudaSuccess;
    };
    const auto of_taps = [&](auto taps) {
      using Chosen = decltype(taps);
      if (channels_inside != 0) {
        return choose([&](int rows) {
          const int64_t strips = ceil_div(geometry[3], Chosen::kOutputs);
          return ceil_div(images * ceil_div(out_height, rows) * strips, kDepthwiseThreads / across);
        });
      }
      int bands = 1;
      while (bands < out_height &&
             band_bytes<Chosen>(geometry, ceil_div(out_height, bands)) > kBandBytes) {
        ++bands;
      }
      cut.rows = static_cast<int32_t>(ceil_div(out_height, bands));
      return choose([&](int rows) {
        return ceil_div(images * ceil_div(out_height, rows),
                        bands_together<Chosen>(geometry, rows));
      });
    };
    return with_taps<T>(geometry, of_taps, [&] {
      return choose([&](int) { return static_cast<int64_t>(images) * out_height; });
    });
  });
  return cut;
}

int neq_cuda_depthwise_wgrad(int32_t dtype, const void* dy, const int64_t* dy_strides,
                             const void* x, const int64_t* x_strides, const int32_t* geometry,
                             const int64_t* order, const int32_t* count, float* parts,
                             float* bias_parts, int32_t images, int32_t per_input, int32_t rows,
                             int32_t number_of_parts, int32_t most, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* g = geometry;
    const int64_t units = static_cast<int64_t>(images) * g[2] * g[3];
    if (rows < 1 || number_of_parts < 1 || units > INT_MAX) return cudaErrorInvalidValue;
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
    d.per_input = per_input;
    d.most = most;
    d.rows = rows;
    d.bands = static_cast<int>(ceil_div(d.out_height, rows));
    const bool channels_inside = d.dy_strides.channel == 1 && d.x_strides.channel == 1;
    const bool pixels_inside = d.dy_strides.column == 1 && d.x_strides.column == 1 &&
                               d.dy_strides.line == d.out_width && d.x_strides.line == d.width;
    d.across = channels_inside ? power_of_two(most, kLanes) : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div(most, d.across)),
                    static_cast<unsigned>(number_of_parts));
    const auto any = [&] {
      d.columns = channels_inside ? 1 : power_of_two(d.out_width, kDepthwiseThreads);
      return launch_any(d, grid, stream);
    };
    return with_taps<T>(
        g,
        [&](auto taps) {
          using Chosen = decltype(taps);
          constexpr int kSums = kSumsShared<Chosen::kNumber + 1>;
          const int64_t step = std::max(d.dy_strides.column, d.x_strides.column);
          if (channels_inside && step < kMostColumnStride) {
            d.columns = static_cast<int>(ceil_div(d.out_width, Chosen::kOutputs));
            d.units = d.images * d.bands * d.columns;
            d.per_part = static_cast<int>(ceil_div(d.units, number_of_parts));
            return launch(depthwise_strips_kernel<Chosen>, grid, kDepthwiseThreads, kSums, stream,
                          d);
          }
          d.together = bands_together<Chosen>(g, rows);
          const int64_t tile = d.together * band_bytes<Chosen>(g, rows);
          if (channels_inside || !pixels_inside || tile > kMostTileBytes) return any();
          d.units = d.images * d.bands;
          d.per_part = static_cast<int>(ceil_div(d.units, number_of_parts));
          return launch(depthwise_planes_kernel<Chosen>, grid, kDepthwiseThreads,
                        static_cast<size_t>(tile < kSums ? kSums : tile), stream, d);
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
                  dim3(static_cast<unsigned>(ceil_div(k * taps, kDepthwiseThreads))),
                  kDepthwiseThreads, 0, stream, f);
  });
}

}  // extern "C"
