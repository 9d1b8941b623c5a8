// Which accesses are ordered before which, by barriers, warp synchronization, and fences with
// atomics.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace neq::emu {

struct PartialSync {
  uint32_t when, mask;
};

// Threads of one block that accessed a cell, with nothing that orders any of them after another.
struct Users {
  uint32_t when;  // the last of them; times below the launch's or the block's start mean nobody
  uint32_t block;
  uint32_t pc;
  uint32_t lanes;  // of `warp`
  uint16_t warp;
  bool is_atomic;
  bool in_other_warps;  // too, one of them `other_thread`
  uint16_t other_thread;
  uint32_t other_pc;
};

// Accesses of one block that reached another thread: those before `barrier`, in every warp those
// before `sync`, of every thread those before `fence`.
struct Seen {
  uint32_t barrier = 0;
  std::vector<uint32_t> sync, fence;

  void merge(const Seen& other);
  bool covers(const Users& users) const;
};

// By block.
class History {
 public:
  void clear() { blocks_.clear(); }
  bool empty() const { return blocks_.empty(); }
  void merge(const History& other);
  bool covers(const Users& users) const;
  // What the running thread sees now.
  void add_present();

 private:
  std::map<uint32_t, Seen> blocks_;
};

// Of a thread, a warp or a block: what it may read, what it will be able to read after a fence, and
// what its atomic operations hand on.
struct Histories {
  History acquired, pending, released;

  void clear();
  void take(Histories& from);
};

// Whether all of `users` are ordered before the next access of these lanes of the running thread's
// warp.
bool ordered(const Users& users, uint32_t lanes);

// Adds the running thread, or those lanes of its warp, to `users`; who is ordered before leaves.
void join(Users& users, uint32_t lanes, uint32_t pc);

// `__threadfence`, and an atomic operation on this address, by the running thread.
void fence();
void exchange_history(const void* address);

// After barriers.
void merge_block_history();
void merge_warp_history();
void forget_locations();

}  // namespace neq::emu
