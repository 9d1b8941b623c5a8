#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "finish.cuh"

extern "C" int neq_cuda_finish(int32_t from, int32_t dtype, const void* parts,
                               const void* bias_parts, const int64_t* order, const int32_t* count,
                               void* grad, void* bias, int64_t k, int64_t c, int64_t c_stride,
                               int64_t tap_stride, int32_t number_of_parts,
                               int32_t number_of_bias_parts, int32_t most, int32_t taps,
                               void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (c * taps >= int64_t{1} << 31) return cudaErrorInvalidValue;
    const auto finish = [&](auto part) {
      using From = decltype(part);
      const Finish<From, T> f{static_cast<const From*>(parts),
                              static_cast<const From*>(bias_parts),
                              order,
                              count,
                              static_cast<T*>(grad),
                              static_cast<T*>(bias),
                              k,
                              c_stride,
                              tap_stride,
                              static_cast<int>(c),
                              static_cast<int>(c * taps),
                              number_of_parts,
                              number_of_bias_parts,
                              most};
      const int64_t threads = k * (f.row_size / kFinishColumns);
      return launch(finish_kernel<From, T>,
                    dim3(static_cast<unsigned>(ceil_div(threads, kFinishThreads))), kFinishThreads,
                    kFinishShared, stream, f);
    };
    // Parts are float, or rows that PyTorch computed in the gradient's own dtype.
    if (from == neq_float32) return finish(float{});
    return from == dtype ? finish(T{}) : cudaErrorInvalidValue;
  });
}
