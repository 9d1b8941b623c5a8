#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "few_rows_conv.cuh"

namespace neq::cuda {
namespace {

static_assert(kFewNeurons == kWarpNeurons);

template <class T, int kNeurons, int kWidth, class Call>
auto with_columns(int64_t columns, const Call& call) {
  if (columns <= 64) return call(FewRows<T, kNeurons, 4, kWidth>{});
  if (columns <= 128) return call(FewRows<T, kNeurons, 8, kWidth>{});
  // As many as shared memory has room for.
  return call(FewRows<T, kNeurons, 32 / sizeof(T), kWidth>{});
}

// `width`: of the images. Wide rectangles may cover a seventh more of them than narrow ones.
template <class T, int kNeurons, class Call>
auto with_tile(int64_t columns, int64_t width, const Call& call) {
  const int64_t wide = ceil_div(width, 16) * 16, narrow = ceil_div(width, 8) * 8;
  return 7 * wide <= 8 * narrow ? with_columns<T, kNeurons, 16>(columns, call)
                                : with_columns<T, kNeurons, 8>(columns, call);
}

template <class T, int kNeurons>
cudaError_t few_rows_conv(const FewRowsConv<T>& f, int parts, void* stream) {
  return with_tile<T, kNeurons>(f.c, f.width, [&](auto tile) {
    using Tile = decltype(tile);
    FewRowsConv<T> cut = f;
    const int64_t rectangles =
        f.images * ceil_div(f.height, Tile::kHeight) * ceil_div(f.width, Tile::kWidth);
    const int64_t per_part = ceil_div(rectangles, parts);
    if (per_part * parts >= int64_t{1} << 31) return cudaErrorInvalidValue;
    cut.rectangles_per_part = static_cast<int>(per_part);
    const dim3 grid(static_cast<unsigned>(ceil_div(f.c, Tile::kColumns)),
                    static_cast<unsigned>(parts));
    return launch(few_rows_conv_kernel<Tile>, grid, Tile::kThreads, Tile::kSharedBytes, stream,
                  cut);
  });
}

}  // namespace
}  // namespace neq::cuda

extern "C" NeqRectangle neq_cuda_few_rows_conv_rectangle(int32_t dtype, int64_t c, int32_t width) {
  using namespace neq::cuda;
  NeqRectangle found{};
  with_dtype(dtype, [&](auto zero) {
    found = with_tile<decltype(zero), kWarpNeurons>(c, width, [](auto tile) {
      using Tile = decltype(tile);
      return NeqRectangle{Tile::kHeight, Tile::kWidth, Tile::kColumns};
    });
    return cudaSuccess;
  });
  return found;
}

extern "C" int neq_cuda_few_rows_conv(int32_t dtype, const void* dy, int64_t dy_stride,
                                      const void* x, const int64_t* x_strides, const int32_t* sizes,
                                      const int64_t* order, const int32_t* count, float* parts,
                                      float* bias_parts, int32_t most_parts, int64_t c,
                                      int32_t images, int32_t most, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* g = sizes;
    const int64_t pixels = int64_t{images} * g[2] * g[3];
    if (most > kFewNeurons || g[4] > kMostPadding || g[5] > kMostPadding ||
        pixels >= int64_t{1} << 31) {
      return cudaErrorInvalidValue;
    }
    const FewRowsConv<T> f{static_cast<const T*>(dy),
                           dy_stride,
                           static_cast<const T*>(x),
                           x_strides[0],
                           x_strides[1],
                           x_strides[2],
                           order,
                           count,
                           parts,
                           bias_parts,
                           c,
                           images,
                           g[0],
                           g[1],
                           g[2],
                           g[3],
                           g[4],
                           g[5],
                           0,
                           most};
    return most <= 8 ? few_rows_conv<T, 8>(f, most_parts, stream)
                     : few_rows_conv<T, 16>(f, most_parts, stream);
  });
}
