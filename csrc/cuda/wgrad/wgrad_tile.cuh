// The product that every dense weight gradient comes to: neurons x columns, summed over rows t,
//
//   sums[i, c] = sum over t of dY[t, order[i]] * X[t, c]
//
// with tensor cores for 16-bit types. A block computes a tile of neurons and columns for a part of
// the rows. Rows are copied to shared memory in the background, kStages steps ahead.
//
// dY is read in one of two ways. Gathered: of each row those 16-byte vectors that hold an active
// neuron, and each thread picks its neurons in shared memory. Packed: rows whose neurons lie side
// by side already (see pack.cuh), as the tensor cores read them.
#pragma once

#include <type_traits>

#include "../common/elements.cuh"
#include "../common/ptx.cuh"
#include "../common/slots.cuh"

namespace neq::cuda {

// What every GPU from 7.5 on has for a block, in bytes.
constexpr int kMostShared = 64 << 10;
// A warp's part of a tile: one fragment of neurons, and columns in fragments of 8.
constexpr int kWarpNeurons = 16, kFragmentColumns = 8, kFragmentRows = 16;

template <class T_, bool kGathered_, int kNeurons_, int kColumns_, int kWarpColumns_, int kRows_,
          int kStages_>
struct Tile {
  using T = T_;
  static constexpr bool kGathered = kGathered_;
  static constexpr int kNeurons = kNeurons_, kColumns = kColumns_, kWarpColumns = kWarpColumns_;
  static constexpr int kRows = kRows_, kStages = kStages_;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kNeurons / kWarpNeurons * kWarpsAcross * kLanes;
  static constexpr int kFragments = kWarpColumns / kFragmentColumns;

  // A vector more per row, so that a column of vectors lies in different banks.
  static constexpr int kDyVectors = kGathered ? kNeurons : kNeurons / kVector<T>;
  static constexpr int kDyPitch = (kDyVectors + 1) * kVectorBytes;
  static constexpr int kXVectors = kColumns / kVector<T>;
  static constexpr int kXPitch = (kXVectors + 1) * kVectorBytes;
  // In a stage rows of dY lie before those of X.
  static constexpr int kXAt = kRows * kDyPitch;
  static constexpr int kStageBytes = kXAt + kRows * kXPitch;
  static constexpr int kSlotBytes = kGathered ? static_cast<int>(sizeof(Slots<kNeurons>)) : 0;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSlotBytes;
  // Each thread copies one vector of some rows of each.
  static constexpr int kDyRowsTogether = kThreads / kDyVectors;
  static constexpr int kDyRows = (kRows + kDyRowsTogether - 1) / kDyRowsTogether;
  static constexpr int kXRowsTogether = kThreads / kXVectors;
  static constexpr int kXRows = kRows / kXRowsTogether;
  static_assert(kSharedBytes <= kMostShared);
  static_assert(kThreads % kDyVectors == 0 && kThreads % kXVectors == 0);
  static_assert(kRows % kXRowsTogether == 0);
  static_assert(kThreads >= kNeurons && kRows % kFragmentRows == 0);
};

// Fragments of 16-bit types: two values to a register, see ptx::mma_16816.
template <class T>
struct Products {
  struct Neurons {
    uint32_t pair[4];
  };

  // `at`: bytes in a row of the lane's neurons g and g + 8.
  static __device__ __forceinline__ Neurons gathered(const unsigned char* rows, int pitch,
                                                     const int (&at)[2], int lane) {
    Neurons a;
    const unsigned char* mine = rows + lane % 4 * 2 * pitch;
    for (int i = 0; i < 4; ++i) {
      const unsigned char* low = mine + i / 2 * 8 * pitch + at[i % 2];
      a.pair[i] = *reinterpret_cast<const uint16_t*>(low) |
                  static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(low + pitch)) << 16;
    }
    return a;
  }

  static __device__ __forceinline__ Neurons packed(const unsigned char* rows, int pitch, int lane) {
    Neurons a;
    // Matrices: rows 0..7 and 8..15, each of neurons 0..7 and 8..15.
    const int row = lane % 8 + lane / 16 * 8, neurons = lane / 8 % 2;
    ptx::ldmatrix_x4_trans(a.pair, rows + row * pitch + neurons * kVectorBytes);
    return a;
  }

  // The neurons themselves: a product with ones.
  static __device__ __forceinline__ void add_to(float (&sums)[4], const Neurons& a, int) {
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
    ptx::mma_16816<T>(sums, a.pair, {kOnes, kOnes});
  }

  template <int kFragments>
  static __device__ __forceinline__ void multiply(float (&sums)[kFragments][4], const Neurons& a,
                                                  const unsigned char* rows, int pitch, int lane) {
    static_assert(kFragments % 2 == 0);
    const unsigned char* mine = rows + lane % 16 * pitch + lane / 16 * kVectorBytes;
#pragma unroll
    for (int f = 0; f < kFragments; f += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, mine + f * kVectorBytes);
      ptx::mma_16816<T>(sums[f], a.pair, {b[0], b[1]});
      ptx::mma_16816<T>(sums[f + 1], a.pair, {b[2], b[3]});
    }
  }
};

// The same tiles, lane by lane, without tensor cores: they would round to TF32.
template <>
struct Products<float> {
  struct Neurons {
    const unsigned char* rows;
    int pitch, at[2];
  };

  static __device__ __forceinline__ Neurons gathered(const unsigned char* rows, int pitch,
                                                     const int (&at)[2], int lane) {
    return {rows, pitch, {at[0], at[1]}};
  }

  static __device__ __forceinline__ Neurons packed(const unsigned char* rows, int pitch, int lane) {
    const int at = lane / 4 * static_cast<int>(sizeof(float));
    return {rows, pitch, {at, at + 8 * static_cast<int>(sizeof(float))}};
  }

  static __device__ __forceinline__ float value(const Neurons& a, int row, int i) {
    return *reinterpret_cast<const float*>(a.rows + row * a.pitch + a.at[i]);
  }

  static __device__ __forceinline__ void add_to(float (&sums)[4], const Neurons& a, int) {
#pragma unroll 4
    for (int row = 0; row < kFragmentRows; ++row) {
      sums[0] += value(a, row, 0);
      sums[2] += value(a, row, 1);
    }
  }

  template <int kFragments>
  static __device__ __forceinline__ void multiply(float (&sums)[kFragments][4], const Neurons& a,
                                                  const unsigned char* rows, int pitch, int lane) {
    const unsigned char* mine = rows + lane % 4 * static_cast<int>(sizeof(float2));
#pragma unroll 4
    for (int row = 0; row < kFragmentRows; ++row) {
      const float first = value(a, row, 0), second = value(a, row, 1);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        const float2 x =
            *reinterpret_cast<const float2*>(mine + row * pitch + f * 8 * sizeof(float));
        sums[f][0] += first * x.x;
        sums[f][1] += first * x.y;
        sums[f][2] += second * x.x;
        sums[f][3] += second * x.y;
      }
    }
  }
};

}  // namespace neq::cuda
