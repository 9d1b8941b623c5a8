// From the number that says a dtype to the type.
#pragma once

#include <cuda_runtime.h>

#include "../launchers.h"
#include "elements.cuh"

namespace neq::cuda {

// `call` with a value of the type.
template <class Call>
cudaError_t with_dtype(int32_t dtype, const Call& call) {
  switch (dtype) {
    case neq_float32:
      return call(float{});
    case neq_float16:
      return call(__half{});
    case neq_bfloat16:
      return call(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace neq::cuda
