#include "../common/dtypes.cuh"
#include "../common/launch.cuh"
#include "row_steps.cuh"

namespace neq::cuda {
namespace {

constexpr size_t kSgdShared = kMostStepNeurons * sizeof(SgdNeuron);
constexpr size_t kAdamShared = kMostStepNeurons * sizeof(AdamNeuron);

float as_float(double value) { return static_cast<float>(value); }

}  // namespace
}  // namespace neq::cuda

extern "C" {

int neq_cuda_sgd_rows(int32_t dtype, const int64_t* addresses, const int64_t* shapes,
                      int32_t parameters, int64_t blocks, double lr, double momentum,
                      double dampening, double weight_decay, int32_t with_momentum,
                      int32_t nesterov, int32_t maximize, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const SgdRows<T> s{{addresses, shapes, parameters},
                       as_float(lr),
                       as_float(momentum),
                       as_float(1 - dampening),
                       as_float(weight_decay),
                       maximize != 0 ? -1.0f : 1.0f,
                       nesterov != 0};
    return launch(with_momentum != 0 ? sgd_rows_kernel<T, true> : sgd_rows_kernel<T, false>,
                  dim3(static_cast<unsigned>(blocks)), kStepThreads, kSgdShared, stream, s);
  });
}

int neq_cuda_adam_rows(int32_t dtype, const int64_t* addresses, const int64_t* shapes,
                       int32_t parameters, int64_t blocks, double lr, double beta1, double beta2,
                       double eps, double weight_decay, int32_t amsgrad, int32_t decoupled,
                       int32_t maximize, void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const AdamRows<T> s{{addresses, shapes, parameters},
                        as_float(lr),
                        as_float(std::log(beta1)),
                        as_float(std::log(beta2)),
                        as_float(beta1),
                        as_float(1 - beta1),
                        as_float(beta2),
                        as_float(1 - beta2),
                        as_float(eps),
                        as_float(decoupled != 0 ? 0 : weight_decay),
                        as_float(decoupled != 0 ? 1 - lr * weight_decay : 1),
                        maximize != 0 ? -1.0f : 1.0f};
    return launch(amsgrad != 0 ? adam_rows_kernel<T, true> : adam_rows_kernel<T, false>,
                  dim3(static_cast<unsigned>(blocks)), kStepThreads, kAdamShared, stream, s);
  });
}

}  // extern "C"
