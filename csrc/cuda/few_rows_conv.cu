#include "dtypes.cuh"
#include "few_rows_conv.cuh"
#include "launch.cuh"

namespace neq::cuda {
namespace {

template <class Tile>
cudaError_t launch_tile(const FewRowsConv<typename Tile::T>& f, int parts, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(f.c, Tile::kColumns)),
                  static_cast<unsigned>(parts));
  return launch(few_rows_conv_kernel<Tile>, grid, Tile::kThreads, Tile::kSharedBytes, stream, f);
}

template <class T, int kNeurons, class Call>
auto with_tile(int64_t columns, const Call& call) {
  if (columns <= 64) return call(FewRows<T, kNeurons, 4>{});
  if (columns <= 128) return call(FewRows<T, kNeurons, 8>{});
  // As many as shared memory has room for.
  return call(FewRows<T, kNeurons, 32 / sizeof(T)>{});
}

template <class T, int kNeurons>
cudaError_t few_rows_conv(const FewRowsConv<T>& f, int parts, void* stream) {
  return with_tile<T, kNeurons>(
      f.c, [&](auto tile) { return launch_tile<decltype(tile)>(f, parts, stream); });
}

}  // namespace
}  // namespace neq::cuda

extern "C" NeqTile neq_cuda_few_rows_conv_tile(int32_t dtype, int64_t columns) {
  using namespace neq::cuda;
  NeqTile found{};
  with_dtype(dtype, [&](auto zero) {
    found = with_tile<decltype(zero), kWarpNeurons>(columns, [](auto tile) {
      return NeqTile{kTileHeight, decltype(tile)::kColumns, kTileWidth};
    });
    return cudaSuccess;
  });
  return found;
}

extern "C" int neq_cuda_few_rows_conv(int32_t dtype, const void* dy, int32_t channels,
                                      const void* x, const int64_t* x_strides,
                                      const int32_t* geometry, const int32_t* count, float* parts,
                                      int32_t most_parts, int64_t c, int32_t images, int32_t most,
                                      void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* g = geometry;
    const int64_t tiles = images * ceil_div(g[0], kTileHeight) * ceil_div(g[1], kTileWidth);
    const int64_t per_part = ceil_div(tiles, most_parts);
    const int64_t pixels = int64_t{images} * g[2] * g[3];
    constexpr int64_t kMost = int64_t{1} << 31;
    if ((channels != 8 && channels != 16) || most > channels) return cudaErrorInvalidValue;
    if (pixels >= kMost || per_part * most_parts >= kMost) {
      return cudaErrorInvalidValue;
    }
    const FewRowsConv<T> f{static_cast<const T*>(dy),
                           static_cast<const T*>(x),
                           x_strides[0],
                           x_strides[1],
                           x_strides[2],
                           count,
                           parts,
                           c,
                           images,
                           g[0],
                           g[1],
                           g[2],
                           g[3],
                           g[4],
                           g[5],
                           static_cast<int>(per_part),
                           most};
    return channels == 8 ? few_rows_conv<T, 8>(f, most_parts, stream)
                         : few_rows_conv<T, 16>(f, most_parts, stream);
  });
}
