#include "history.h"

#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace neq::emu {

namespace {

// What atomic operations have released at an address.
std::unordered_map<const void*, History> locations;

// Whether chains of syncs lead from each of the users, all in this warp, to all of `lanes`.
bool synced_in_warp(const Warp& warp, const Users& users, uint32_t lanes) {
  if (users.in_other_warps || users.warp != thread->warp()) return false;
  if (users.when <= warp.synced) return true;
  for (uint32_t rest = users.lanes; rest != 0; rest &= rest - 1) {
    uint32_t reached = rest & -rest;
    for (const PartialSync& sync : warp.partial_syncs) {
      if (sync.when > users.when && (sync.mask & reached) != 0) reached |= sync.mask;
    }
    if ((lanes & ~reached) != 0) return false;
  }
  return true;
}

}  // namespace

void Seen::merge(const Seen& other) {
  barrier = std::max(barrier, other.barrier);
  sync.resize(std::max(sync.size(), other.sync.size()));
  fence.resize(std::max(fence.size(), other.fence.size()));
  for (size_t i = 0; i < other.sync.size(); ++i) sync[i] = std::max(sync[i], other.sync[i]);
  for (size_t i = 0; i < other.fence.size(); ++i) fence[i] = std::max(fence[i], other.fence[i]);
}

bool Seen::covers(const Users& users) const {
  if (users.when <= barrier) return true;
  if (users.in_other_warps) return false;
  if (users.when <= sync[users.warp]) return true;
  for (uint32_t rest = users.lanes; rest != 0; rest &= rest - 1) {
    if (users.when > fence[users.warp * kWarpSize + __builtin_ctz(rest)]) return false;
  }
  return true;
}

void History::merge(const History& other) {
  for (const auto& [number, seen] : other.blocks_) blocks_[number].merge(seen);
}

bool History::covers(const Users& users) const {
  const auto seen = blocks_.find(users.block);
  return seen != blocks_.end() && seen->second.covers(users);
}

void History::add_present() {
  Seen& seen = blocks_[block.number];
  seen.sync.resize(block.warps.size());
  seen.fence.resize(block.n_threads);
  seen.barrier = block.synced;
  seen.sync[thread->warp()] = warp_of(*thread).synced;
  seen.fence[thread->number] = now;
}

void Histories::clear() {
  acquired.clear();
  pending.clear();
  released.clear();
}

void Histories::take(Histories& from) {
  acquired.merge(from.acquired);
  pending.merge(from.pending);
  released.merge(from.released);
  from.clear();
}

bool ordered(const Users& users, uint32_t lanes) {
  if (users.when <= launched.started) return true;
  const Warp& warp = warp_of(*thread);
  if (users.block == block.number) {
    if (users.when <= block.synced) return true;
    if (synced_in_warp(warp, users, lanes)) return true;
  }
  return thread->seen.acquired.covers(users) || warp.seen.acquired.covers(users) ||
         block.seen.acquired.covers(users);
}

void join(Users& users, uint32_t lanes, uint32_t pc) {
  const uint16_t warp = static_cast<uint16_t>(thread->warp());
  if (users.block != block.number || ordered(users, lanes)) {
    users = {now, block.number, pc, lanes, warp, false, false, 0, 0};
    return;
  }
  if (users.warp == warp) {
    users.lanes |= lanes;
  } else {
    users.in_other_warps = true;
    users.other_thread = static_cast<uint16_t>(users.warp * kWarpSize + __builtin_ctz(users.lanes));
    users.other_pc = users.pc;
    users.warp = warp;
    users.lanes = lanes;
  }
  users.when = now;
  users.pc = pc;
}

void fence() {
  Histories& own = thread->seen;
  const Histories* const levels[] = {&own, &warp_of(*thread).seen, &block.seen};
  for (const Histories* level : levels) own.acquired.merge(level->pending);
  own.pending.clear();
  for (const Histories* level : levels) own.released.merge(level->acquired);
  own.released.add_present();
}

void exchange_history(const void* address) {
  const auto known = locations.find(address);
  if (known != locations.end()) thread->seen.pending.merge(known->second);
  for (const Histories* level : {&thread->seen, &warp_of(*thread).seen, &block.seen}) {
    if (!level->released.empty()) locations[address].merge(level->released);
  }
}

void merge_block_history() {
  for (Warp& warp : block.warps) block.seen.take(warp.seen);
  for (Thread& t : block.threads) block.seen.take(t.seen);
}

void merge_warp_history() {
  Warp& warp = warp_of(*thread);
  const unsigned first = thread->warp() * kWarpSize;
  for (unsigned number = first; number < std::min(first + kWarpSize, block.n_threads); ++number) {
    warp.seen.take(block.threads[number].seen);
  }
}

void forget_locations() { locations.clear(); }

}  // namespace neq::emu
