// A place in the source: as a default argument, that of the call.
#pragma once

namespace neq::emu {

struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace neq::emu
