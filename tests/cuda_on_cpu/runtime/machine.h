// The emulated GPU: one block at a time, its threads as fibers.
#pragma once

#include <string>
#include <vector>

#include "../include/cuda_runtime.h"
#include "fiber.h"
#include "history.h"

namespace neq::emu {

#ifdef NEQ_EMU_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;
constexpr uint32_t kAllLanes = 0xffffffffu;

enum class Order : int { kNatural, kReversed, kRandom };

struct Settings {
  Order order = Order::kNatural;
  uint64_t seed = 0;
  bool copies_at_issue = false;
  int multiprocessors = 108;
  int compute_capability = 80;
  size_t shared_limit = 99 * 1024;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kExited };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint32_t group;
  const void* pc;
};

struct Thread {
  Context context;
  char* stack;
  uint3 index;
  unsigned number;
  State state;
  // Where it waits, and for what.
  const char* waits_for;
  Site site;
  // Asynchronous copies from `first_copy` on are unfinished; `group` is the one being filled.
  std::vector<Copy> copies;
  size_t first_copy;
  uint32_t group;
  Histories seen;

  unsigned lane() const { return number % kWarpSize; }
  unsigned warp() const { return number / kWarpSize; }
};

// Lanes that wait for each other.
struct Group {
  uint32_t mask, arrived;
  const char* what;
  Site site;
};

struct Warp {
  uint32_t ready, alive;
  int n_groups;
  Group groups[kWarpSize];
  alignas(64) uint32_t in[kWarpSize][8];
  alignas(64) float out[kWarpSize][4];
  const void* rows[kWarpSize];
  // Times of the last `__syncwarp` of all lanes, and those of some lanes since then.
  uint32_t synced;
  std::vector<PartialSync> partial_syncs;
  Histories seen;
};

struct Block {
  uint32_t number;
  unsigned n_threads, n_alive, n_at_barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Context scheduler;
  // Times of its start and of its last barrier.
  uint32_t started, synced;
  Histories seen;
};

struct Launch {
  const Call* call;
  dim3 grid, block;
  size_t shared_bytes;
  uint32_t started;
};

extern Settings settings;
extern Launch launched;
extern Block block;
extern Thread* thread;  // the one that runs; nullptr in host code
extern unsigned char* shared_memory;
extern uint32_t now;  // counts the accesses of kernels
extern std::string error;
extern bool failed;

inline Warp& warp_of(const Thread& t) { return block.warps[t.warp()]; }

uint3 block_index(uint32_t number);

// Runs the current launch to its end, or to its first error.
void run_blocks();

// Gives the processor to other threads until this one is ready again.
void wait(State state, const char* what, Site site);

// Waits for all lanes of `mask`; the last one to arrive calls `finish` before any of them goes on.
template <class F>
void meet(uint32_t mask, const char* what, Site site, const F& finish);

// Returns whether all lanes are there, and else waits until they have been.
bool arrive(uint32_t mask, const char* what, Site site);
void release_group(uint32_t mask);

template <class F>
void meet(uint32_t mask, const char* what, Site site, const F& finish) {
  if (!arrive(mask, what, site)) return;
  finish(warp_of(*thread));
  release_group(mask);
}

}  // namespace neq::emu
