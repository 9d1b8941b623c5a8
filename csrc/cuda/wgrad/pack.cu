#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "pack.cuh"

extern "C" int64_t neq_cuda_pack_rows() { return neq::cuda::kPackRows; }

extern "C" int neq_cuda_pack(int32_t dtype, const void* rows, int64_t stride, const int64_t* order,
                             const int32_t* count, void* packed, int64_t packed_stride, float* sums,
                             int32_t blocks, int64_t t, int32_t most, int32_t transposed,
                             void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Pack<T> p{static_cast<const T*>(rows),
                    stride,
                    order,
                    count,
                    static_cast<T*>(packed),
                    packed_stride,
                    sums,
                    t,
                    most};
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(ceil_div(most, kPackChannels)));
    return launch(transposed != 0 ? pack_kernel<T, true> : pack_kernel<T, false>, grid,
                  kPackThreads, kPackShared, stream, p);
  });
}
