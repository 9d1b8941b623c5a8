// What launches move between the multiprocessors and global memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace neq::emu {

constexpr size_t kSectorBytes = 32;

// Which bytes of a region a launch has touched.
class RegionTraffic {
 public:
  void start(uintptr_t begin, uintptr_t end);
  void touch(size_t offset, size_t bytes, Access access);
  // Bytes read, bytes written, sectors read, sectors written, as a JSON list.
  std::string json() const;

 private:
  uintptr_t begin_ = 0;
  std::vector<uint8_t> touched_;
};

void start_counting(size_t n_regions);
void count_shared(size_t bytes, Access access);
void count_global(RegionTraffic& traffic, uint32_t region, size_t offset, uintptr_t address,
                  size_t bytes, Access access, uint32_t pc);
void count_host_write(RegionTraffic& traffic, uint32_t region, size_t offset, uintptr_t address,
                      size_t bytes);
std::string counts_json(const std::vector<std::string>& names,
                        const std::vector<const RegionTraffic*>& touched);

}  // namespace neq::emu
