// Accesses of the same bytes that nothing orders.
#pragma once

#include <functional>
#include <string>

#include "check.h"
#include "error.h"
#include "shadow.h"

namespace neq::emu {

struct Request {
  uintptr_t address;
  size_t bytes;
  Access access;
  uint32_t lanes;  // of the running thread's warp
  const void* pc;
};

// What an address is, for messages.
using Describe = std::function<std::string(uintptr_t)>;

std::string name_of(Access access);

// One of `users`, if possible not of these lanes of the running thread's warp.
Party party_of(const Users& users, uint32_t lanes, const char* what);

// Stops the launch if the request is not ordered after the accesses of the cell, which lies at
// `at`, and adds it to them. Accesses until `nobody_until` do not count.
void check_race(Cell& cell, uintptr_t at, const Request& request, uint32_t nobody_until,
                const Describe& describe);

void forget_reads();

}  // namespace neq::emu
