// Which vectors of a row hold a block's neurons. Neurons ascend, so those that share a vector are
// neighbours; of each vector there is one slot.
#pragma once

#include "elements.cuh"

namespace neq::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// In shared memory. `at` is in bytes, in a row of slots.
template <int kNeurons>
struct alignas(kVectorBytes) Slots {
  int64_t vector[kNeurons];
  int at[kNeurons];
  int leaders[(kNeurons + kLanes - 1) / kLanes];
  int count;
};

// Of `neurons` (at most kNeurons) neurons from `order` on. By all threads of a block, which are at
// least kNeurons; ends with a barrier.
template <class T, int kNeurons>
__device__ __forceinline__ void find_slots(const int64_t* order, int neurons,
                                           Slots<kNeurons>& slots) {
  const int i = static_cast<int>(threadIdx.x), lane = i % kLanes;
  const bool exists = i < neurons;
  const int64_t neuron = exists ? order[i] : 0;
  const int64_t vector = neuron / kVector<T>;
  int64_t before = __shfl_sync(kAllLanes, static_cast<int>(vector), lane - 1);
  if (exists && lane == 0 && i > 0) before = order[i - 1] / kVector<T>;
  const bool leads = exists && (i == 0 || before != vector);
  const unsigned leaders = __ballot_sync(kAllLanes, leads);
  if (i < kNeurons && lane == 0) slots.leaders[i / kLanes] = __popc(leaders);
  __syncthreads();
  int slot = __popc(leaders & (kAllLanes >> (kLanes - 1 - lane))) - 1;
  for (int warp = 0; warp < i / kLanes && warp * kLanes < kNeurons; ++warp) {
    slot += slots.leaders[warp];
  }
  if (leads) slots.vector[slot] = vector;
  if (i < kNeurons) {
    const int within = static_cast<int>(neuron % kVector<T>) * static_cast<int>(sizeof(T));
    slots.at[i] = exists ? slot * kVectorBytes + within : 0;
  }
  if (i == neurons - 1) slots.count = slot + 1;
  __syncthreads();
}

}  // namespace neq::cuda
