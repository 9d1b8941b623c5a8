#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "tile_rules.h"
#include "wgrad.cuh"

namespace neq::cuda {
namespace {

template <class T, bool kGathered>
using FewTile = Tile<T, kGathered, kFewNeurons, 1024 / sizeof(T), 128 / sizeof(T), 16, 3>;
template <class T, bool kGathered>
using FewColumnsTile = Tile<T, kGathered, kFewNeurons, kFewColumns, 16, 32, 3>;
template <class T>
using WideTile = Tile<T, true, kMostGathered, 128, 32, 16, 3>;
template <class T>
using PackedTile = Tile<T, false, 64, 128, 64, 32, sizeof(T) == 4 ? 2 : 3>;

template <class T, class Call>
auto with_tile(int32_t most, int64_t columns, bool packed, const Call& call) {
  switch (tile_kind(most, columns, packed)) {
    case TileKind::few:
      return packed ? call(FewTile<T, false>{}) : call(FewTile<T, true>{});
    case TileKind::few_columns:
      return packed ? call(FewColumnsTile<T, false>{}) : call(FewColumnsTile<T, true>{});
    case TileKind::wide:
      return call(WideTile<T>{});
    default:
      return call(PackedTile<T>{});
  }
}

template <class T, class Rows>
cudaError_t wgrad(Wgrad<T, Rows> w, int taps, bool packed, void* stream) {
  return with_tile<T>(w.most, w.c, packed, [&](auto tile) {
    using Chosen = decltype(tile);
    w.x.set_step(Chosen::kRows);
    if (w.t_per_part % Chosen::kRows != 0) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(ceil_div(w.c, Chosen::kColumns) * taps),
                    static_cast<unsigned>(ceil_div(w.most, Chosen::kNeurons)),
                    static_cast<unsigned>(ceil_div(w.t, w.t_per_part)));
    return launch(wgrad_kernel<Chosen, Rows>, grid, Chosen::kThreads, Chosen::kSharedBytes, stream,
                  w);
  });
}

}  // namespace
}  // namespace neq::cuda

extern "C" {

NeqTile neq_cuda_tile(int32_t dtype, int32_t most, int64_t columns, int32_t packed) {
  using namespace neq::cuda;
  NeqTile found{};
  with_dtype(dtype, [&](auto zero) {
    with_tile<decltype(zero)>(most, columns, packed != 0, [&](auto tile) {
      using Chosen = decltype(tile);
      found = {Chosen::kNeurons, Chosen::kColumns, Chosen::kRows};
      return cudaSuccess;
    });
    return cudaSuccess;
  });
  return found;
}

int neq_cuda_linear_wgrad(int32_t dtype, const void* dy, int64_t dy_stride, const void* x,
                          int64_t x_stride, const int64_t* order, const int32_t* count,
                          float* parts, float* bias_parts, int64_t t, int64_t t_per_part, int64_t c,
                          int32_t most, int32_t packed, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const MatrixRows<T> rows{static_cast<const T*>(x), x_stride};
    const Wgrad<T, MatrixRows<T>> w{static_cast<const T*>(dy),
                                    dy_stride,
                                    rows,
                                    order,
                                    count,
                                    parts,
                                    bias_parts,
                                    t,
                                    t_per_part,
                                    c,
                                    most};
    return wgrad(w, 1, packed != 0, stream);
  });
}

int neq_cuda_conv_wgrad(int32_t dtype, const void* dy, int64_t dy_stride, const void* x,
                        const int64_t* x_strides, const int32_t* geometry, const int64_t* order,
                        const int32_t* count, float* parts, float* bias_parts, int64_t t,
                        int64_t t_per_part, int64_t c, int32_t most, int32_t packed, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t* g = geometry;
    const PixelRows<T> rows{static_cast<const T*>(x),
                            x_strides[0],
                            x_strides[1],
                            x_strides[2],
                            g[0],
                            g[1],
                            g[2],
                            g[3],
                            g[5],
                            g[6],
                            g[7],
                            g[8],
                            g[9],
                            g[10],
                            g[11],
                            0,
                            0,
                            0};
    const Wgrad<T, PixelRows<T>> w{static_cast<const T*>(dy),
                                   dy_stride,
                                   rows,
                                   order,
                                   count,
                                   parts,
                                   bias_parts,
                                   t,
                                   t_per_part,
                                   c,
                                   most};
    return wgrad(w, g[4] * g[5], packed != 0, stream);
  });
}

}  // extern "C"
