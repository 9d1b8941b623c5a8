// What stops a launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../include/site.h"

namespace neq::emu {

// A place in the kernel: the return address of a hook, or a line that the call brought along.
struct Place {
  uintptr_t pc = 0;
  Site site;

  Place(const void* pc) : pc(reinterpret_cast<uintptr_t>(pc)) {}
  Place(uint32_t offset);
  Place(Site site) : site(site) {}
};

// Another thread that has to do with it.
struct Party {
  std::string what;
  uint32_t block;
  unsigned thread;
  Place place;
};

// Stops the launch: the running thread never goes on. The first error of a run is the one that is
// reported.
[[noreturn]] void fail(const char* kind, const std::string& message, const Place& place,
                       const std::vector<Party>& others = {});

// The same for what no single thread has done.
void record_error(const char* kind, const std::string& message,
                  const std::vector<Party>& others = {});

// Offsets of return addresses in the library: they fit into 32 bits.
uint32_t offset_of(const void* pc);

}  // namespace neq::emu
