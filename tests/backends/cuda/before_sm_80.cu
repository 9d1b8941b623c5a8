// The products of GPUs before sm_80 beside those of the emulated instruction.
#include "common/before_sm_80.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace {

struct Parameters {
  const uint32_t* a;
  const uint32_t* b;
  float* plain;
  float* emulated;
};

template <class T>
__global__ void products_kernel(Parameters p) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = p.a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[2 * lane + i];
  float plain[4] = {1, 2, 3, 4}, emulated[4] = {1, 2, 3, 4};
  neq::ptx::before_sm_80::multiply<T>(plain, a, b);
  neq::ptx::mma_16816<T>(emulated, a, b);
  for (int i = 0; i < 4; ++i) {
    p.plain[4 * lane + i] = plain[i];
    p.emulated[4 * lane + i] = emulated[i];
  }
}

}  // namespace

extern "C" int products(int is_half, const uint32_t* a, const uint32_t* b, float* plain,
                        float* emulated) {
  const Parameters p{a, b, plain, emulated};
  return neq::cuda::launch(is_half != 0 ? products_kernel<__half> : products_kernel<__nv_bfloat16>,
                           dim3(1), 32, 0, nullptr, p);
}
