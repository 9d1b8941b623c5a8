// Per channel sums from which the cosine of two outputs follows, in one pass over both.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "ops.h"
#include "simd/kernels.h"
#include "tensor/split.h"
#include "tensor/strides.h"

namespace neq {
namespace {

constexpr int64_t kElementsPerThread = 16384;

template <class T>
void reduce(const T* a, const T* b, const ChannelView& view, const Split& rows,
            const Split& channels, double* partial) {
  const int64_t k = view.channels;
  const int64_t elements_per_item = std::max<int64_t>(1, rows.size * channels.size * view.inner);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements_per_item);
  torch::stable::parallel_for(
      0, rows.parts * channels.parts, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t part = item / channels.parts;
          const int64_t first = channels.begin(item % channels.parts);
          const int64_t last = channels.end(item % channels.parts);
          const int64_t row = rows.begin(part), n_rows = rows.end(part) - row;
          double* sums = partial + part * 3 * k;
          if (view.inner == 1) {
            const int64_t at = row * k + first;
            kernels<T>().products_of_columns(a + at, b + at, n_rows, k, last - first, sums + first,
                                             sums + k + first, sums + 2 * k + first);
            continue;
          }
          for (int64_t c = first; c < last; ++c) {
            double products[3] = {0, 0, 0};
            for (int64_t r = row; r < row + n_rows; ++r) {
              const int64_t at = (r * k + c) * view.inner;
              kernels<T>().products_of_run(a + at, b + at, view.inner, products);
            }
            for (int64_t s = 0; s < 3; ++s) sums[s * k + c] = products[s];
          }
        }
      });
}

}  // namespace

Tensor channel_similarity(const Tensor& a, const Tensor& b, int64_t dim) {
  require_cpu(a, "a");
  require_cpu(b, "b");
  require_same_dtype(b, a, "b");
  require_same_shape(b, a, "b");
  dim = checked_dim(a, dim);
  std::vector<int64_t> dims = memory_order(a);
  Tensor x = a;
  if (!is_dense(a, dims)) {
    x = torch::stable::contiguous(a);
    dims = memory_order(x);
  }
  const Tensor y = in_order(b, dims);
  const ChannelView view = channel_view(x, dims, dim);

  const bool columns = view.inner == 1;
  const Split rows(view.outer, columns ? 64 : 32, columns ? 64 : 1);
  const Split channels(view.channels, columns ? (view.channels + 255) / 256 : view.channels, 1);
  std::vector<double> partial(rows.parts * 3 * view.channels, 0.0);
  dispatch_floating(x.scalar_type(), "a", [&](auto zero) {
    using T = decltype(zero);
    reduce(static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
           view, rows, channels, partial.data());
  });

  Tensor result = empty_in_order({3, view.channels}, {0, 1}, ScalarType::Double);
  double* sums = result.mutable_data_ptr<double>();
  std::fill_n(sums, 3 * view.channels, 0.0);
  for (int64_t part = 0; part < rows.parts; ++part) {
    for (int64_t i = 0; i < 3 * view.channels; ++i)
      sums[i] += partial[part * 3 * view.channels + i];
  }
  return result;
}

}  // namespace neq
