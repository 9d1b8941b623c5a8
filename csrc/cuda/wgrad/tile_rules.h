// Which tile computes a weight gradient, and whether dY is packed first. Operators cut their work
// and launchers choose their kernels by these rules alone.
#pragma once

#include <cstdint>

namespace neq::cuda {

// Up to so many neurons are few, or are gathered at all; more are packed first.
constexpr int kFewNeurons = 16, kMostGathered = 32;
// Few neurons take a smaller tile where a layer has no more columns.
constexpr int kFewColumns = 64;

enum class TileKind { few, few_columns, wide, packed };

constexpr TileKind tile_kind(int64_t most, int64_t columns, bool packed) {
  if (most > kFewNeurons) return packed ? TileKind::packed : TileKind::wide;
  return columns > kFewColumns ? TileKind::few : TileKind::few_columns;
}

// Where several tiles share the columns of a matrix, each would read dY again.
constexpr bool packs_matrix(int64_t most, int64_t column_tiles) {
  return most > kMostGathered || (most <= kFewNeurons && column_tiles > 1);
}

// Of a convolution that is computed tap by tap.
constexpr bool packs_taps(int64_t most) { return most > kMostGathered; }

// Padding that a convolution in one pass over X may have, see few_rows_conv.cuh.
constexpr int kMostPadding = 2;

// `geometry`: as neq_cuda_conv_wgrad takes it.
constexpr bool is_in_one_pass(int64_t most, const int32_t* geometry) {
  const int32_t *kernel = geometry + 4, *stride = geometry + 6, *padding = geometry + 8;
  const int32_t* dilation = geometry + 10;
  return most <= kFewNeurons && kernel[0] == 3 && kernel[1] == 3 && stride[0] == 1 &&
         stride[1] == 1 && dilation[0] == 1 && dilation[1] == 1 && padding[0] <= kMostPadding &&
         padding[1] <= kMostPadding;
}

// Of a convolution in one pass: where several tiles share the columns, each reads dY again. Neurons
// times tiles up to which that moves less than packing does.
constexpr int64_t kMostReadings = 8;

constexpr bool packs_one_pass(int64_t most, int64_t column_tiles) {
  return column_tiles > 1 && column_tiles * most > kMostReadings;
}

}  // namespace neq::cuda
