// Synchronization, exchange of registers, and matrix fragments.
#include "../include/ptx_on_cpu.h"
#include "check.h"
#include "error.h"
#include "machine.h"
#include "mma.h"

using namespace neq::emu;

void __syncthreads(Site site) {
  ++block.n_at_barrier;
  wait(State::kAtBarrier, "__syncthreads", site);
}

void __syncwarp(unsigned mask, Site site) {
  meet(mask, "__syncwarp", site, [&](Warp& warp) {
    if constexpr (!kChecked) return;
    if (mask == kAllLanes) {
      warp.synced = now;
      warp.partial_syncs.clear();
      merge_warp_history();
    } else {
      warp.partial_syncs.push_back({++now, mask});
    }
  });
}

void __threadfence() {
  if constexpr (kChecked) fence();
}

unsigned __ballot_sync(unsigned mask, int predicate, Site site) {
  uint32_t* const out = reinterpret_cast<uint32_t*>(warp_of(*thread).out[thread->lane()]);
  warp_of(*thread).in[thread->lane()][0] = predicate != 0;
  meet(mask, "__ballot_sync", site, [&](Warp& warp) {
    uint32_t votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane & 1u) != 0) votes |= warp.in[lane][0] << lane;
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if ((mask >> lane & 1u) != 0) std::memcpy(warp.out[lane], &votes, 4);
    }
  });
  uint32_t votes;
  std::memcpy(&votes, out, 4);
  return votes;
}

namespace neq::emu {

namespace {

// The lane that `lane` gets its value from, inside its part of `width` lanes.
unsigned source_lane(unsigned lane, int argument, int width, Shuffle kind) {
  const unsigned first = lane & ~static_cast<unsigned>(width - 1), end = first + width;
  unsigned source = lane;
  if (kind == Shuffle::kIndex) source = first + (static_cast<unsigned>(argument) & (width - 1));
  if (kind == Shuffle::kXor) source = lane ^ static_cast<unsigned>(argument);
  if (kind == Shuffle::kDown) source = lane + static_cast<unsigned>(argument);
  return source < end ? source : lane;
}

constexpr const char* kShuffleNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync"};

}  // namespace

uint32_t shuffle(unsigned mask, uint32_t word, int argument, int width, Shuffle kind, Site site) {
  const unsigned lane = thread->lane();
  const unsigned source = source_lane(lane, argument, width, kind);
  const char* name = kShuffleNames[static_cast<int>(kind)];
  if ((mask >> source & 1u) == 0) {
    fail("divergence", std::string(name) + " reads from a lane that its mask does not name", site);
  }
  Warp& own = warp_of(*thread);
  own.in[lane][0] = word;
  own.in[lane][1] = source;
  meet(mask, name, site, [&](Warp& warp) {
    for (unsigned l = 0; l < kWarpSize; ++l) {
      if ((mask >> l & 1u) != 0) std::memcpy(warp.out[l], &warp.in[warp.in[l][1]][0], 4);
    }
  });
  std::memcpy(&word, own.out[lane], 4);
  return word;
}

void load_matrices(uint32_t* registers, const void* row, int n_matrices, bool transposed,
                   Site site) {
  constexpr unsigned kRows = 8;
  Warp& own = warp_of(*thread);
  const unsigned lane = thread->lane();
  [[maybe_unused]] const void* const pc = __builtin_return_address(0);
  own.rows[lane] = row;
  meet(kAllLanes, n_matrices == 4 ? "ldmatrix_x4" : "ldmatrix_x2", site, [&](Warp& warp) {
    if constexpr (kChecked) {
      for (unsigned l = 0; l < kRows * n_matrices; ++l) check_row(warp.rows[l], pc);
    }
    for (int m = 0; m < n_matrices; ++m) {
      const uint16_t* rows[kRows];
      for (unsigned r = 0; r < kRows; ++r) {
        rows[r] = static_cast<const uint16_t*>(warp.rows[m * kRows + r]);
      }
      for (unsigned l = 0; l < kWarpSize; ++l) {
        const unsigned major = l / 4, minor = l % 4 * 2;
        const uint16_t pair[2] = {transposed ? rows[minor][major] : rows[major][minor],
                                  transposed ? rows[minor + 1][major] : rows[major][minor + 1]};
        std::memcpy(&warp.out[l][m], pair, 4);
      }
    }
  });
  std::memcpy(registers, own.out[lane], sizeof(uint32_t) * n_matrices);
}

void multiply(MultiplyTile tile, float* sums, const uint32_t* a, const uint32_t* b, Site site) {
  Warp& own = warp_of(*thread);
  const unsigned lane = thread->lane();
  std::memcpy(own.in[lane], a, 4 * sizeof(uint32_t));
  std::memcpy(own.in[lane] + 4, b, 2 * sizeof(uint32_t));
  std::memcpy(own.out[lane], sums, 4 * sizeof(float));
  meet(kAllLanes, "mma_16816", site, [&](Warp& warp) { tile(warp.in, warp.out); });
  std::memcpy(sums, own.out[lane], 4 * sizeof(float));
}

void multiply_half(const uint32_t (*operands)[8], float (*sums)[4]) {
  multiply_tile<float_from_half>(operands, sums);
}

void multiply_bfloat16(const uint32_t (*operands)[8], float (*sums)[4]) {
  multiply_tile<float_from_bfloat16>(operands, sums);
}

}  // namespace neq::emu
