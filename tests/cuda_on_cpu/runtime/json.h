// Text for Python's json module.
#pragma once

#include <string>
#include <type_traits>

namespace neq::emu {

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + '"';
}

class Json {
 public:
  template <class Value>
  Json& add(const char* name, const Value& value) {
    text_ += (text_.empty() ? "" : ", ") + quoted(name) + ": ";
    if constexpr (std::is_arithmetic_v<Value>) {
      text_ += std::to_string(value);
    } else {
      text_ += value;
    }
    return *this;
  }
  std::string object() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

class JsonList {
 public:
  void add(const std::string& value) { text_ += (text_.empty() ? "" : ", ") + value; }
  std::string list() const { return "[" + text_ + "]"; }

 private:
  std::string text_;
};

}  // namespace neq::emu
