#include "check.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <optional>

#include "error.h"
#include "machine.h"
#include "races.h"
#include "traffic.h"

namespace neq::emu {

namespace {

struct Range {
  uintptr_t begin, end;
  bool holds(uintptr_t address, size_t bytes) const {
    return begin <= address && bytes <= end - begin && address - begin <= end - begin - bytes;
  }
};

struct Region {
  std::string name;
  Range range;
  size_t item_bytes;
  bool writable;
  std::optional<Shadow> shadow;
  RegionTraffic traffic;
};

// A copy into shared memory that is under way, by 16-byte line.
struct CopyUnderWay {
  uint32_t when, pc;
  unsigned thread;
};

constexpr size_t kCopyBytes = 16;

std::vector<Region> regions;  // by address
std::optional<Shadow> shared_shadow;
std::vector<CopyUnderWay> copies_under_way;
std::string count_of(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

// --- the library's constants ---------------------------------------------------------------------

// Loaded without permission to write, or made constant after relocation.
int add_constants(dl_phdr_info* info, size_t, void* found) {
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&add_constants), &own);
  if (reinterpret_cast<void*>(info->dlpi_addr) != own.dli_fbase) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const bool constant = header.p_type == PT_LOAD && (header.p_flags & PF_W) == 0;
    if (!constant && header.p_type != PT_GNU_RELRO) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    static_cast<std::vector<Range>*>(found)->push_back({begin, begin + header.p_memsz});
  }
  return 1;
}

bool is_constant(uintptr_t address, size_t bytes) {
  static const std::vector<Range> constants = [] {
    std::vector<Range> found;
    dl_iterate_phdr(add_constants, &found);
    return found;
  }();
  const auto of = [](auto& object) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(&object);
    return Range{begin, begin + sizeof(object)};
  };
  const uintptr_t arguments = reinterpret_cast<uintptr_t>(launched.call->arguments);
  for (const Range& range : {of(threadIdx), of(blockIdx), of(blockDim), of(gridDim),
                             Range{arguments, arguments + launched.call->argument_bytes}}) {
    if (range.holds(address, bytes)) return true;
  }
  return std::any_of(constants.begin(), constants.end(),
                     [&](const Range& range) { return range.holds(address, bytes); });
}

// --- messages ------------------------------------------------------------------------------------

std::string describe(const Region& region, uintptr_t address) {
  const size_t offset = address - region.range.begin;
  return region.name + ", byte " + std::to_string(offset) + " (element " +
         std::to_string(offset / region.item_bytes) + ")";
}

std::string describe_shared(uintptr_t address) {
  return "shared memory, byte " +
         std::to_string(address - reinterpret_cast<uintptr_t>(shared_memory));
}

// What lies closest to an address that belongs to nothing.
std::string describe_outside(uintptr_t address, size_t bytes) {
  if (address < 4096) return std::to_string(address) + " past a null pointer";
  const uintptr_t shared = reinterpret_cast<uintptr_t>(shared_memory);
  std::string nearest = "far from everything";
  uintptr_t distance = UINTPTR_MAX;
  const auto consider = [&](const std::string& name, const Range& range) {
    const bool behind = address + bytes > range.end;
    if (!behind && address >= range.begin) return;
    const uintptr_t apart = behind ? address + bytes - range.end : range.begin - address;
    if (apart >= distance) return;
    distance = apart;
    const std::string size = " of " + count_of(range.end - range.begin);
    nearest = behind ? "ending " + count_of(apart) + " past the end of " + name + size
                     : "beginning " + count_of(apart) + " before " + name + size;
  };
  consider("the shared memory", {shared, shared + launched.shared_bytes});
  for (const Region& region : regions) consider(region.name, region.range);
  return nearest;
}

// --- where an access goes ------------------------------------------------------------------------

void check_shared(const Request& request) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(shared_memory);
  const size_t first = (request.address - base) / kCopyBytes;
  const size_t last = (request.address + request.bytes - 1 - base) / kCopyBytes;
  for (size_t line = first; line <= last; ++line) {
    const CopyUnderWay& copy = copies_under_way[line];
    if (copy.when <= block.started) continue;
    fail("unfinished copy",
         name_of(request.access) + " of " + describe_shared(request.address) +
             ", into which a copy is under way: no cp_async_wait has finished it",
         request.pc, {{"the copy", block.number, copy.thread, Place(copy.pc)}});
  }
  shared_shadow->visit(
      request.address, request.bytes, request.access == Access::kWrite,
      [&](Cell& cell, uintptr_t at) {
        if (request.access != Access::kWrite && cell.writes.when <= block.started) {
          fail("uninitialised",
               name_of(request.access) + " of " + describe_shared(at) +
                   ", which this block has not written yet",
               request.pc);
        }
        check_race(cell, at, request, block.started, describe_shared);
      });
}

void check_global(Region& region, const Request& request) {
  if (!region.writable) {
    if (request.access == Access::kRead) return;
    fail("out of bounds",
         name_of(request.access) + " of " + describe(region, request.address) +
             ", which this launch may only read",
         request.pc);
  }
  if (!region.shadow) {
    region.shadow.emplace(region.range.begin, region.range.end - region.range.begin,
                          region.item_bytes);
  }
  const Describe describe_here = [&region](uintptr_t at) { return describe(region, at); };
  region.shadow->visit(request.address, request.bytes, request.access == Access::kWrite,
                       [&](Cell& cell, uintptr_t at) {
                         check_race(cell, at, request, launched.started, describe_here);
                       });
  if (request.access == Access::kAtomic) {
    exchange_history(reinterpret_cast<const void*>(request.address));
  }
}

Region* find_region(uintptr_t address, size_t bytes) {
  static size_t last = 0;
  if (last < regions.size() && regions[last].range.holds(address, bytes)) return &regions[last];
  const auto above =
      std::upper_bound(regions.begin(), regions.end(), address,
                       [](uintptr_t a, const Region& region) { return a < region.range.begin; });
  if (above == regions.begin()) return nullptr;
  last = static_cast<size_t>(above - regions.begin()) - 1;
  return regions[last].range.holds(address, bytes) ? &regions[last] : nullptr;
}

bool is_on_stack(const Thread& t, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(t.stack) < kStackBytes;
}

void check(const Request& request) {
  if (++now == 0) fail("too long", "the checked build counts 2^32 accesses", request.pc);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(shared_memory);
  if (Range{shared, shared + launched.shared_bytes}.holds(request.address, request.bytes)) {
    count_shared(request.bytes, request.access);
    check_shared(request);
    return;
  }
  if (Region* region = find_region(request.address, request.bytes)) {
    count_global(region->traffic, static_cast<uint32_t>(region - regions.data()),
                 request.address - region->range.begin, request.address, request.bytes,
                 request.access, offset_of(request.pc));
    check_global(*region, request);
    return;
  }
  if (request.access == Access::kRead && is_constant(request.address, request.bytes)) return;
  for (const Thread& t : block.threads) {
    if (is_on_stack(t, request.address)) {
      fail("out of bounds",
           name_of(request.access) + " of " + count_of(request.bytes) +
               " on the stack of another thread",
           request.pc);
    }
  }
  fail("out of bounds",
       name_of(request.access) + " of " + count_of(request.bytes) + ", " +
           describe_outside(request.address, request.bytes),
       request.pc);
}

}  // namespace

void add_region(const std::string& name, const void* base, size_t bytes, size_t item_bytes,
                bool writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
  Region region{name, {begin, begin + bytes}, item_bytes, writable, std::nullopt, {}};
  const auto at = std::upper_bound(
      regions.begin(), regions.end(), begin,
      [](uintptr_t address, const Region& other) { return address < other.range.begin; });
  regions.insert(at, std::move(region));
}

void clear_regions() {
  regions.clear();
  forget_reads();
}

void check_access(const void* address, size_t bytes, Access access, const void* pc) {
  if (thread == nullptr || bytes == 0) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (is_on_stack(*thread, at)) return;
  check({at, bytes, access, 1u << thread->lane(), pc});
}

void check_aligned(const void* address, size_t bytes, Access access, const void* pc) {
  if (thread == nullptr) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % bytes != 0) {
    fail("misaligned",
         name_of(access) + " of " + count_of(bytes) + " at an address " + count_of(at % bytes) +
             " past a multiple of " + std::to_string(bytes),
         pc);
  }
  check_access(address, bytes, access, pc);
}

void check_read_only(const void* address, size_t bytes, const void* pc) {
  check_aligned(address, bytes, Access::kRead, pc);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  Region* region = find_region(at, bytes);
  if (region == nullptr || !region->shadow) return;
  region->shadow->visit(at, bytes, false, [&](const Cell& cell, uintptr_t cell_at) {
    if (cell.writes.when <= launched.started) return;
    fail("stale read",
         "read of " + describe(*region, cell_at) +
             " through the read-only cache, after this launch has written it",
         pc, {party_of(cell.writes, 0, "a write")});
  });
}

void check_row(const void* row, const void* pc) {
  constexpr size_t kRowBytes = 16;
  const uintptr_t at = reinterpret_cast<uintptr_t>(row);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(shared_memory);
  if (at % kRowBytes != 0) fail("misaligned", "a row for ldmatrix is not aligned to 16 bytes", pc);
  if (!Range{shared, shared + launched.shared_bytes}.holds(at, kRowBytes)) {
    fail("out of bounds", "a row for ldmatrix: 16 bytes, " + describe_outside(at, kRowBytes), pc);
  }
  check({at, kRowBytes, Access::kRead, kAllLanes, pc});
}

void check_copy_start(const void* to, const void* from, size_t bytes, const void* pc) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(shared_memory);
  if (at % kCopyBytes != 0 || reinterpret_cast<uintptr_t>(from) % kCopyBytes != 0) {
    fail("misaligned", "an address of an asynchronous copy is not a multiple of 16", pc);
  }
  if (!Range{shared, shared + launched.shared_bytes}.holds(at, kCopyBytes)) {
    fail("out of bounds", "asynchronous copy to 16 bytes, " + describe_outside(at, kCopyBytes), pc);
  }
  if (bytes > 0) check_access(from, bytes, Access::kRead, pc);
  check_access(to, kCopyBytes, Access::kWrite, pc);
  copies_under_way[(at - shared) / kCopyBytes] = {now, offset_of(pc), thread->number};
}

void check_copy_end(const void* to, const void* pc) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(to);
  copies_under_way[(at - reinterpret_cast<uintptr_t>(shared_memory)) / kCopyBytes].when = 0;
  ++now;
  check_shared({at, kCopyBytes, Access::kWrite, 1u << thread->lane(), pc});
}

void check_host_write(const void* address, size_t bytes, const char* what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  Region* region = find_region(at, bytes);
  if (region == nullptr || !region->writable) {
    record_error("out of bounds", std::string(what) + " of " + count_of(bytes) + ", " +
                                      (region == nullptr ? describe_outside(at, bytes)
                                                         : region->name + " may only be read"));
    return;
  }
  count_host_write(region->traffic, static_cast<uint32_t>(region - regions.data()),
                   at - region->range.begin, at, bytes);
}

void start_checking() {
  constexpr uint32_t kRestart = 1u << 31;
  if (now > kRestart) {
    for (Region& region : regions) region.shadow.reset();
    shared_shadow.reset();
    copies_under_way.clear();
    launched.started = now = 1;
  }
  forget_reads();
  forget_locations();
  start_counting(regions.size());
  for (Region& region : regions) region.traffic.start(region.range.begin, region.range.end);
}

void start_checking_block() {
  if (launched.shared_bytes > copies_under_way.size() * kCopyBytes) {
    shared_shadow.emplace(reinterpret_cast<uintptr_t>(shared_memory), launched.shared_bytes, 1);
    copies_under_way.assign(launched.shared_bytes / kCopyBytes + 1, {});
  }
}

std::string traffic_json() {
  std::vector<std::string> names;
  std::vector<const RegionTraffic*> touched;
  for (const Region& region : regions) {
    names.push_back(region.name);
    touched.push_back(&region.traffic);
  }
  return counts_json(names, touched);
}

}  // namespace neq::emu
