#include "races.h"

#include "machine.h"

namespace neq::emu {

namespace {

// A list for every cell that blocks have read without being ordered, the last one excepted.
struct EarlierRead {
  Users users;
  uint32_t next;
};

std::vector<EarlierRead> earlier_reads(1);  // the first one ends all lists

[[noreturn]] void fail_race(const Request& request, const std::string& where, const Users& users,
                            const char* what) {
  const Party other = party_of(users, request.lanes, what);
  const bool same_block = users.block == block.number;
  const bool same_warp = same_block && other.thread / kWarpSize == thread->warp();
  fail("race",
       name_of(request.access) + " of " + where + ", and " + what + " by another " +
           (same_warp    ? "lane, with no __syncwarp between them"
            : same_block ? "thread, with no barrier between them"
                         : "block, with nothing that orders them: a fence before an atomic "
                           "operation in the one block, and after one in the other"),
       request.pc, {other});
}

}  // namespace

std::string name_of(Access access) {
  if (access == Access::kAtomic) return "atomic operation";
  return access == Access::kRead ? "read" : "write";
}

Party party_of(const Users& users, uint32_t lanes, const char* what) {
  const bool own_warp = users.block == block.number && users.warp == thread->warp();
  if (own_warp && users.in_other_warps) {
    return {what, users.block, users.other_thread, Place(users.other_pc)};
  }
  uint32_t others = own_warp ? users.lanes & ~lanes : users.lanes;
  if (others == 0) others = users.lanes;
  return {what, users.block, users.warp * kWarpSize + __builtin_ctz(others), Place(users.pc)};
}

void check_race(Cell& cell, uintptr_t at, const Request& request, uint32_t nobody_until,
                const Describe& describe) {
  const auto in_conflict = [&](const Users& users) {
    return users.when > nobody_until && !ordered(users, request.lanes);
  };
  const uint32_t pc = offset_of(request.pc);
  const bool is_atomic = request.access == Access::kAtomic;
  if (cell.reads.when <= nobody_until) {
    cell.reads = {};
    cell.earlier_reads = 0;
  }
  if (!(is_atomic && cell.writes.is_atomic) && in_conflict(cell.writes)) {
    fail_race(request, describe(at), cell.writes,
              cell.writes.is_atomic ? "an atomic operation" : "a write");
  }
  if (request.access == Access::kRead) {
    if (cell.reads.block != block.number && in_conflict(cell.reads)) {
      earlier_reads.push_back({cell.reads, cell.earlier_reads});
      cell.earlier_reads = static_cast<uint32_t>(earlier_reads.size() - 1);
    }
    join(cell.reads, request.lanes, pc);
    return;
  }
  if (in_conflict(cell.reads)) fail_race(request, describe(at), cell.reads, "a read");
  for (uint32_t i = cell.earlier_reads; i != 0; i = earlier_reads[i].next) {
    const Users& users = earlier_reads[i].users;
    if (in_conflict(users)) fail_race(request, describe(at), users, "a read");
  }
  cell.reads = {};
  cell.earlier_reads = 0;
  const uint16_t warp = static_cast<uint16_t>(thread->warp());
  cell.writes = {now, block.number, pc, request.lanes, warp, is_atomic, false, 0, 0};
}

void forget_reads() { earlier_reads.resize(1); }

}  // namespace neq::emu
