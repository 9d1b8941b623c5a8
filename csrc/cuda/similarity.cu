#include "dtypes.cuh"
#include "launch.cuh"
#include "similarity.cuh"

namespace neq::cuda {
namespace {

constexpr int kMostParts = 65535;
// So many channels of any size fill their sectors.
constexpr int kWholeSectors = 16;

// How a block lies in [outer, k, inner]: what it has of k, and how many units of work all have.
struct SimilarityCut {
  int64_t channels, units, least_units;  // of a part
  int across, together, pieces;
};

template <class T>
SimilarityCut cut_similarity(int64_t outer, int64_t k, int64_t inner, int width) {
  SimilarityCut cut{};
  if (inner == 1) {
    cut.across = 1;
    while (cut.across < kMostAcross && cut.across * width < k) cut.across *= 2;
    cut.channels = cut.across * width;
    cut.units = outer;
    cut.least_units = kFloatRun * kSimilarityThreads / cut.across;
  } else {
    cut.pieces = static_cast<int>(ceil_div(inner, kPiece<T>));
    int64_t fit = smaller<int64_t>(kPiece<T> / inner, kSimilarityThreads);
    if (fit > kWholeSectors) fit -= fit % kWholeSectors;
    cut.together = fit < 1 ? 1 : static_cast<int>(fit);
    cut.channels = cut.together;
    cut.units = outer * cut.pieces;
    cut.least_units = 2;
  }
  return cut;
}

}  // namespace
}  // namespace neq::cuda

extern "C" {

int32_t neq_cuda_similarity_parts(int32_t dtype, int64_t outer, int64_t k, int64_t inner,
                                  int32_t blocks) {
  using namespace neq::cuda;
  int64_t parts = 1;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const SimilarityCut cut = cut_similarity<T>(outer, k, inner, k % kVector<T> ? 1 : kVector<T>);
    const int64_t wanted = ceil_div(blocks, ceil_div(k, cut.channels));
    parts = smaller<int64_t>(smaller(wanted, ceil_div(cut.units, cut.least_units)), kMostParts);
    return cudaSuccess;
  });
  return parts < 1 ? 1 : static_cast<int32_t>(parts);
}

int neq_cuda_similarity(int32_t dtype, const void* a, const void* b, double* parts, int64_t outer,
                        int64_t k, int64_t inner, int64_t outer_stride, int32_t number_of_parts,
                        void* stream) {
  using namespace neq::cuda;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (number_of_parts < 1) return cudaErrorInvalidValue;
    const auto together = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
    const bool in_vectors =
        together % kVectorBytes == 0 && k % kVector<T> == 0 && outer_stride % kVector<T> == 0;
    const int width = in_vectors ? kVector<T> : 1;
    const SimilarityCut cut = cut_similarity<T>(outer, k, inner, width);
    const Similarity<T> s{static_cast<const T*>(a),
                          static_cast<const T*>(b),
                          parts,
                          outer,
                          k,
                          inner,
                          outer_stride,
                          ceil_div(cut.units, number_of_parts),
                          cut.across,
                          cut.together,
                          cut.pieces};
    const dim3 grid(static_cast<unsigned>(ceil_div(k, cut.channels)),
                    static_cast<unsigned>(number_of_parts));
    if (inner == 1) {
      return launch(
          in_vectors ? similarity_rows_kernel<T, kVector<T>> : similarity_rows_kernel<T, 1>, grid,
          kSimilarityThreads, kSimilarityThreads * sizeof(double) * width, stream, s);
    }
    return launch(similarity_planes_kernel<T>, grid, kSimilarityThreads, kSimilarityShared<T>,
                  stream, s);
  });
}

}  // extern "C"
