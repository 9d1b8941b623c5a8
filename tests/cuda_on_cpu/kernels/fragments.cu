// Matrix fragments as they are in memory, for the comparison with CuTe's.
#include "common/ptx.cuh"

namespace {

// Lane r gives row r of 32 rows of 8 elements: what each load leaves in the registers.
__global__ void load_fragments(const uint4* rows, uint2* x2, uint2* x2_trans, uint4* x4,
                               uint4* x4_trans) {
  uint4* const tile = reinterpret_cast<uint4*>(neq::ptx::dynamic_shared());
  const int lane = threadIdx.x;
  tile[lane] = rows[lane];
  __syncthreads();
  uint32_t two[2], four[4];
  neq::ptx::ldmatrix_x2(two, &tile[lane]);
  x2[lane] = make_uint2(two[0], two[1]);
  neq::ptx::ldmatrix_x2_trans(two, &tile[lane]);
  x2_trans[lane] = make_uint2(two[0], two[1]);
  neq::ptx::ldmatrix_x4(four, &tile[lane]);
  x4[lane] = make_uint4(four[0], four[1], four[2], four[3]);
  neq::ptx::ldmatrix_x4_trans(four, &tile[lane]);
  x4_trans[lane] = make_uint4(four[0], four[1], four[2], four[3]);
}

template <class T>
__global__ void multiply_fragments(const uint4* a, const uint2* b, float4* d) {
  const int lane = threadIdx.x;
  const uint4 from_a = a[lane];
  const uint2 from_b = b[lane];
  const float4 from_d = d[lane];
  float sums[4] = {from_d.x, from_d.y, from_d.z, from_d.w};
  neq::ptx::mma_16816<T>(sums, {from_a.x, from_a.y, from_a.z, from_a.w}, {from_b.x, from_b.y});
  d[lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
}

template <class... Parameters, class... Given>
cudaError_t start(void (*kernel)(Parameters...), Given... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 32 * sizeof(uint4);
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace

extern "C" {

cudaError_t run_load_fragments(const uint4* rows, uint2* x2, uint2* x2_trans, uint4* x4,
                               uint4* x4_trans) {
  return start(load_fragments, rows, x2, x2_trans, x4, x4_trans);
}
cudaError_t run_multiply_half(const uint4* a, const uint2* b, float4* d) {
  return start(multiply_fragments<__half>, a, b, d);
}
cudaError_t run_multiply_bfloat16(const uint4* a, const uint2* b, float4* d) {
  return start(multiply_fragments<__nv_bfloat16>, a, b, d);
}

}  // extern "C"
