// Which thread runs when: a warp runs until all its lanes wait for the block or have ended, only
// then does the next one start. No order that a GPU may choose is more skewed.
#include <algorithm>
#include <numeric>
#include <random>

#include "check.h"
#include "error.h"
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace neq::emu {

Settings settings;
Launch launched;
Block block;
Thread* thread = nullptr;
unsigned char* shared_memory;
uint32_t now = 1;
bool failed = false;

namespace {

std::minstd_rand generator;

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same(const Site& a, const Site& b) { return a.line == b.line && same(a.file, b.file); }

// The numbers below `count`, in the order of the run.
void arrange(std::vector<uint32_t>& numbers, uint32_t count) {
  numbers.resize(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (settings.order == Order::kReversed) std::reverse(numbers.begin(), numbers.end());
  if (settings.order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), generator);
}

uint3 index_in(const dim3& size, uint32_t number) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

void thread_main() {
  launched.call->run(*launched.call);
  Warp& warp = warp_of(*thread);
  const uint32_t bit = 1u << thread->lane();
  warp.alive &= ~bit;
  --block.n_alive;
  for (int i = 0; i < warp.n_groups; ++i) {
    const Group& group = warp.groups[i];
    if ((group.mask & bit) != 0) {
      fail("exited lane", std::string("this thread ends while lanes wait for it in ") + group.what,
           group.site);
    }
  }
  wait(State::kExited, "", {});
}

void start_block(uint32_t number) {
  const dim3& size = launched.block;
  block.number = number;
  block.n_threads = block.n_alive = size.x * size.y * size.z;
  block.n_at_barrier = 0;
  block.threads.resize(block.n_threads);
  block.warps.resize((block.n_threads + kWarpSize - 1) / kWarpSize);
  block.started = block.synced = now;
  block.seen.clear();
  for (Warp& warp : block.warps) {
    warp.ready = warp.alive = 0;
    warp.n_groups = 0;
    warp.synced = now;
    warp.partial_syncs.clear();
    warp.seen.clear();
  }
  for (unsigned i = 0; i < block.n_threads; ++i) {
    Thread& t = block.threads[i];
    t.stack = stack_of(i);
    prepare(t.context, t.stack, kStackBytes, thread_main);
    t.index = index_in(size, i);
    t.number = i;
    t.state = State::kReady;
    t.copies.clear();
    t.first_copy = 0;
    t.group = 0;
    t.seen.clear();
    warp_of(t).ready |= 1u << t.lane();
    warp_of(t).alive |= 1u << t.lane();
  }
  blockIdx = block_index(number);
  std::memset(shared_memory, 0xff, launched.shared_bytes);
  if constexpr (kChecked) start_checking_block();
}

void run_thread(Thread& t) {
  thread = &t;
  threadIdx = t.index;
  warp_of(t).ready &= ~(1u << t.lane());
  switch_context(block.scheduler, t.context);
  thread = nullptr;
}

// Returns whether any of its lanes was ready.
bool run_warp(unsigned number) {
  static std::vector<uint32_t> lanes;
  Warp& warp = block.warps[number];
  if (warp.ready == 0) return false;
  arrange(lanes, kWarpSize);
  while (warp.ready != 0) {
    if (settings.order == Order::kRandom) std::shuffle(lanes.begin(), lanes.end(), generator);
    for (uint32_t lane : lanes) {
      if ((warp.ready >> lane & 1u) == 0) continue;
      run_thread(block.threads[number * kWarpSize + lane]);
      if (failed) return true;
    }
  }
  return true;
}

std::vector<Party> waiting_threads() {
  std::vector<Party> waiting;
  const Thread* last = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state == State::kExited) continue;
    if (last == nullptr || !same(last->waits_for, t.waits_for) || !same(last->site, t.site)) {
      waiting.push_back({std::string("waits in ") + t.waits_for, block.number, t.number, t.site});
    }
    last = &t;
  }
  return waiting;
}

void open_barrier() {
  const Thread* first = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &t;
    if (!same(t.site, first->site)) {
      record_error("divergence", "threads of a block wait at different __syncthreads",
                   waiting_threads());
      return;
    }
  }
  for (Thread& t : block.threads) {
    if (t.state != State::kAtBarrier) continue;
    t.state = State::kReady;
    warp_of(t).ready |= 1u << t.lane();
  }
  block.n_at_barrier = 0;
  if constexpr (kChecked) {
    block.synced = now;
    merge_block_history();
    for (unsigned w = 0; w < block.warps.size(); ++w) {
      block.warps[w].synced = now;
      block.warps[w].partial_syncs.clear();
      end_requests(w);
    }
  }
}

void run_block(uint32_t number) {
  static std::vector<uint32_t> warps;
  start_block(number);
  while (block.n_alive > 0) {
    bool any_ran = false;
    arrange(warps, static_cast<uint32_t>(block.warps.size()));
    for (uint32_t w : warps) {
      any_ran |= run_warp(w);
      if (failed) return;
    }
    if (block.n_alive > 0 && block.n_at_barrier == block.n_alive) {
      open_barrier();
    } else if (!any_ran) {
      record_error("deadlock", "no thread can go on", waiting_threads());
    }
    if (failed) return;
  }
  if constexpr (kChecked) {
    for (unsigned w = 0; w < block.warps.size(); ++w) end_requests(w);
  }
}

}  // namespace

uint3 block_index(uint32_t number) { return index_in(launched.grid, number); }

void run_blocks() {
  generator.seed(static_cast<uint32_t>(settings.seed * 2 + 1));
  blockDim = launched.block;
  gridDim = launched.grid;
  launched.started = now;
  if constexpr (kChecked) start_checking();
  std::vector<uint32_t> numbers;
  arrange(numbers, launched.grid.x * launched.grid.y * launched.grid.z);
  for (uint32_t number : numbers) {
    run_block(number);
    if (failed) return;
  }
}

void wait(State state, const char* what, Site site) {
  Thread& t = *thread;
  t.state = state;
  t.waits_for = what;
  t.site = site;
  switch_context(t.context, block.scheduler);
}

bool arrive(uint32_t mask, const char* what, Site site) {
  Warp& warp = warp_of(*thread);
  const uint32_t bit = 1u << thread->lane();
  if ((mask & bit) == 0) {
    fail("divergence", std::string("a lane calls ") + what + " with a mask that does not name it",
         site);
  }
  if ((mask & ~warp.alive) != 0) {
    fail("exited lane", std::string("the mask of ") + what + " names a lane that has ended", site);
  }
  int i = 0;
  const auto is_ours = [&](const Group& group) {
    return group.mask == mask && same(group.what, what) && same(group.site, site);
  };
  while (i < warp.n_groups && !is_ours(warp.groups[i])) ++i;
  if (i == warp.n_groups) warp.groups[warp.n_groups++] = {mask, 0, what, site};
  Group& group = warp.groups[i];
  group.arrived |= bit;
  if (group.arrived == mask) return true;
  wait(State::kAtCollective, what, site);
  return false;
}

void release_group(uint32_t mask) {
  Warp& warp = warp_of(*thread);
  int i = 0;
  while (warp.groups[i].arrived != mask) ++i;
  warp.groups[i] = warp.groups[--warp.n_groups];
  const unsigned first = thread->warp() * kWarpSize;
  for (uint32_t rest = mask & ~(1u << thread->lane()); rest != 0; rest &= rest - 1) {
    block.threads[first + __builtin_ctz(rest)].state = State::kReady;
  }
  warp.ready |= mask & ~(1u << thread->lane());
  if constexpr (kChecked) {
    if (mask == kAllLanes) end_requests(thread->warp());
  }
}

}  // namespace neq::emu
