#include "error.h"

#include <dlfcn.h>

#include "json.h"
#include "machine.h"

namespace neq::emu {

std::string error;

namespace {

uintptr_t library_base() {
  static const uintptr_t base = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&offset_of), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return base;
}

std::string triple(const uint3& index) {
  return "[" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + "]";
}

uint3 thread_index(unsigned number) {
  const dim3& size = launched.block;
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

Json& add_place(Json& json, const Place& place) {
  if (place.pc != 0) return json.add("pc", place.pc - library_base());
  return json.add("file", quoted(place.site.file)).add("line", place.site.line);
}

std::string parties_json(const std::vector<Party>& parties) {
  JsonList list;
  for (const Party& party : parties) {
    Json json;
    json.add("what", quoted(party.what))
        .add("block", triple(block_index(party.block)))
        .add("thread", triple(thread_index(party.thread)));
    list.add(add_place(json, party.place).object());
  }
  return list.list();
}

void record(const char* kind, const std::string& message, const Place* place,
            const std::vector<Party>& others) {
  if (failed) return;
  failed = true;
  Json json;
  json.add("kind", quoted(kind)).add("message", quoted(message));
  json.add("others", parties_json(others));
  json.add("kernel", offset_of(launched.call->kernel)).add("block", triple(blockIdx));
  if (thread != nullptr) json.add("thread", triple(thread->index));
  if (place != nullptr) add_place(json, *place);
  error = json.object();
}

}  // namespace

Place::Place(uint32_t offset) : pc(library_base() + offset) {}

uint32_t offset_of(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - library_base());
}

void fail(const char* kind, const std::string& message, const Place& place,
          const std::vector<Party>& others) {
  record(kind, message, &place, others);
  for (;;) switch_context(thread->context, block.scheduler);
}

void record_error(const char* kind, const std::string& message, const std::vector<Party>& others) {
  record(kind, message, nullptr, others);
}

}  // namespace neq::emu
