// What the checked build looks at: every access of kernel code to memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace neq::emu {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Memory that a kernel may access: a tensor, under the name that messages give it.
void add_region(const std::string& name, const void* base, size_t bytes, size_t item_bytes,
                bool writable);
void clear_regions();

// An access by the running thread, before it happens. Stops the launch unless it is in bounds, and
// ordered with those of other threads.
void check_access(const void* address, size_t bytes, Access access, const void* pc);

// The same for an access that must be aligned to its size.
void check_aligned(const void* address, size_t bytes, Access access, const void* pc);

// A read through the cache that does not see what this launch writes.
void check_read_only(const void* address, size_t bytes, const void* pc);

// A matrix row that `ldmatrix` reads for all lanes.
void check_row(const void* row, const void* pc);

// An asynchronous copy of 16 bytes: nobody may touch its target until it is finished.
void check_copy_start(const void* to, const void* from, size_t bytes, const void* pc);
void check_copy_end(const void* to, const void* pc);

// A whole range that the host API writes.
void check_host_write(const void* address, size_t bytes, const char* what);

// Of the launch that is about to start, and of one that has ended.
void start_checking();
void start_checking_block();
std::string traffic_json();

// Requests of the running thread's warp do not reach past a point where its lanes meet.
void end_requests(unsigned warp);

}  // namespace neq::emu
