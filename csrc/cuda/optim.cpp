#include "device.h"
#include "launchers.h"
#include "ops.h"

namespace neq::cuda {

void sgd_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
               int64_t parameters, int64_t blocks, double lr, double momentum, double dampening,
               double weight_decay, bool with_momentum, bool nesterov, bool maximize) {
  const OnDevice device(first);
  check("sgd_rows_",
        neq_cuda_sgd_rows(dtype_of(first), addresses.const_data_ptr<int64_t>(),
                          shapes.const_data_ptr<int64_t>(), static_cast<int32_t>(parameters),
                          blocks, lr, momentum, dampening, weight_decay, with_momentum, nesterov,
                          maximize, device.stream()));
}

void adam_rows_(const Tensor& first, const Tensor& addresses, const Tensor& shapes,
                int64_t parameters, int64_t blocks, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool amsgrad, bool decoupled, bool maximize) {
  const OnDevice device(first);
  check("adam_rows_",
        neq_cuda_adam_rows(dtype_of(first), addresses.const_data_ptr<int64_t>(),
                           shapes.const_data_ptr<int64_t>(), static_cast<int32_t>(parameters),
                           blocks, lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled,
                           maximize, device.stream()));
}

}  // namespace neq::cuda
