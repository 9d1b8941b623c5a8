#include "traffic.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>

#include "json.h"
#include "machine.h"

namespace neq::emu {

namespace {

// A lane's part of a request, one for every sector. The `turn`-th executions of an instruction by
// the lanes of a warp are one request.
struct Part {
  uint32_t instruction, region, turn;
  uint64_t sector;
  uint32_t bytes;

  auto request() const { return std::tie(instruction, region, turn); }
  auto key() const { return std::tie(instruction, region, turn, sector); }
};

struct Counts {
  uint64_t requests, sectors, bytes;
};

struct Instruction {
  uint32_t pc;
  Access access;
};

struct WarpRequests {
  std::vector<Part> parts;
  std::vector<uint32_t> turns;  // by instruction and lane
};

std::vector<WarpRequests> open_requests(kMaxWarps);
std::vector<Instruction> instructions;
std::unordered_map<uint64_t, uint32_t> numbers;          // of instructions
std::map<std::pair<uint32_t, uint32_t>, Counts> counts;  // by instruction and region
uint64_t shared_bytes[3];

uint32_t number_of(const Instruction& instruction) {
  static uint64_t last_key = 0;
  static uint32_t last = 0;
  const uint64_t key = uint64_t{instruction.pc} << 2 | static_cast<uint64_t>(instruction.access);
  if (key == last_key && last < instructions.size()) return last;
  const auto [at, is_new] = numbers.emplace(key, static_cast<uint32_t>(instructions.size()));
  if (is_new) instructions.push_back(instruction);
  last_key = key;
  return last = at->second;
}

}  // namespace

void RegionTraffic::start(uintptr_t begin, uintptr_t end) {
  begin_ = begin;
  touched_.assign(end - begin, 0);
}

void RegionTraffic::touch(size_t offset, size_t bytes, Access access) {
  const uint8_t how = access == Access::kRead ? 1 : access == Access::kWrite ? 2 : 3;
  for (size_t i = offset; i < offset + bytes; ++i) touched_[i] |= how;
}

std::string RegionTraffic::json() const {
  uint64_t bytes[2] = {}, sectors[2] = {};
  uint8_t in_sector = 0;
  for (size_t i = 0; i < touched_.size(); ++i) {
    in_sector |= touched_[i];
    const bool ends = (begin_ + i + 1) % kSectorBytes == 0 || i + 1 == touched_.size();
    for (int way = 0; way < 2; ++way) {
      bytes[way] += touched_[i] >> way & 1;
      if (ends) sectors[way] += in_sector >> way & 1;
    }
    if (ends) in_sector = 0;
  }
  JsonList list;
  for (uint64_t value : {bytes[0], bytes[1], sectors[0], sectors[1]}) {
    list.add(std::to_string(value));
  }
  return list.list();
}

void start_counting(size_t) {
  for (WarpRequests& requests : open_requests) {
    requests.parts.clear();
    requests.turns.clear();
  }
  instructions.clear();
  numbers.clear();
  counts.clear();
  std::fill(std::begin(shared_bytes), std::end(shared_bytes), 0);
}

void count_shared(size_t bytes, Access access) { shared_bytes[static_cast<int>(access)] += bytes; }

void count_global(RegionTraffic& traffic, uint32_t region, size_t offset, uintptr_t address,
                  size_t bytes, Access access, uint32_t pc) {
  traffic.touch(offset, bytes, access);
  const uint32_t instruction = number_of({pc, access});
  WarpRequests& requests = open_requests[thread->warp()];
  const size_t slot = instruction * kWarpSize + thread->lane();
  if (requests.turns.size() <= slot) requests.turns.resize((instruction + 1) * kWarpSize);
  const uint32_t turn = requests.turns[slot]++;
  uint32_t counted = static_cast<uint32_t>(bytes);
  for (uint64_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes;
       ++sector) {
    requests.parts.push_back({instruction, region, turn, sector, counted});
    counted = 0;
  }
}

void count_host_write(RegionTraffic& traffic, uint32_t region, size_t offset, uintptr_t address,
                      size_t bytes) {
  traffic.touch(offset, bytes, Access::kWrite);
  const uint64_t sectors = (address + bytes - 1) / kSectorBytes - address / kSectorBytes + 1;
  counts[{number_of({0, Access::kWrite}), region}] = {1, sectors, bytes};
}

void end_requests(unsigned warp) {
  WarpRequests& requests = open_requests[warp];
  if (requests.parts.empty()) return;
  std::sort(requests.parts.begin(), requests.parts.end(),
            [](const Part& a, const Part& b) { return a.key() < b.key(); });
  const Part* last = nullptr;
  for (const Part& part : requests.parts) {
    Counts& of = counts[{part.instruction, part.region}];
    of.bytes += part.bytes;
    of.requests += last == nullptr || last->request() != part.request();
    of.sectors += last == nullptr || last->key() != part.key();
    last = &part;
  }
  requests.parts.clear();
  requests.turns.clear();
}

std::string counts_json(const std::vector<std::string>& names,
                        const std::vector<const RegionTraffic*>& touched) {
  constexpr const char* kAccessNames[] = {"loads", "stores", "atomics"};
  JsonList lines;
  for (const auto& [key, of] : counts) {
    const Instruction& instruction = instructions[key.first];
    lines.add(Json()
                  .add("pc", instruction.pc)
                  .add("region", quoted(names[key.second]))
                  .add("access", quoted(kAccessNames[static_cast<int>(instruction.access)]))
                  .add("requests", of.requests)
                  .add("sectors", of.sectors)
                  .add("bytes", of.bytes)
                  .object());
  }
  Json regions;
  for (size_t i = 0; i < names.size(); ++i) regions.add(names[i].c_str(), touched[i]->json());
  return Json()
      .add("lines", lines.list())
      .add("touched", regions.object())
      .add("shared_read", shared_bytes[0])
      .add("shared_written", shared_bytes[1] + shared_bytes[2])
      .object();
}

}  // namespace neq::emu
