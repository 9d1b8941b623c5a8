// Prints where NVIDIA's CuTe says that the elements of fragments are, as JSON: for every lane the
// elements in the order of its registers.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

constexpr int kLanes = 32;

// `layout(lane, unit * i)` for i below kCount, in units of `unit`.
template <int kCount, class Layout>
void print(const char* name, const Layout& layout, int unit, const char* end) {
  std::printf("\"%s\": [", name);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kCount; ++i) {
      const bool last = lane + 1 == kLanes && i + 1 == kCount;
      std::printf("%d%s", int(layout(lane, unit * i)) / unit, last ? "]" : ", ");
    }
  }
  std::printf("%s", end);
}

template <class Operation>
void print_product(const char* a, const char* b, const char* d) {
  using Traits = cute::MMA_Traits<Operation>;
  print<8>(a, typename Traits::ALayout{}, 1, ",\n");
  print<4>(b, typename Traits::BLayout{}, 1, ",\n");
  print<4>(d, typename Traits::CLayout{}, 1, ",\n");
}

// Bits to elements of 16: element 8 r + c is column c of the row that lane r gave.
template <class Operation, int kRegisters>
void print_load(const char* name, const char* end) {
  print<2 * kRegisters>(name, typename cute::Copy_Traits<Operation>::DstLayout{}, 16, end);
}

}  // namespace

int main() {
  std::printf("{");
  print_product<cute::SM80_16x8x16_F32F16F16F32_TN>("half_a", "half_b", "half_d");
  print_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16_a", "bfloat16_b", "bfloat16_d");
  print_load<cute::SM75_U32x2_LDSM_N, 2>("ldmatrix_x2", ",\n");
  print_load<cute::SM75_U32x4_LDSM_N, 4>("ldmatrix_x4", ",\n");
  print_load<cute::SM75_U16x4_LDSM_T, 2>("ldmatrix_x2_trans", ",\n");
  print_load<cute::SM75_U16x8_LDSM_T, 4>("ldmatrix_x4_trans", "}\n");
}
