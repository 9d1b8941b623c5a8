// Argument checks. std::invalid_argument reaches Python as ValueError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace neq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A tensor's shape in a message; it is put into words only when the check fails.
struct Shape {
  const Tensor& tensor;
};

inline Shape shape(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "(";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << ")";
}

inline void require_cpu(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu(), name, ": expected a CPU tensor");
}

inline void require_same_dtype(const Tensor& tensor, const Tensor& reference, const char* name) {
  require(tensor.scalar_type() == reference.scalar_type(), name, ": expected dtype ",
          torch::headeronly::toString(reference.scalar_type()), ", got ",
          torch::headeronly::toString(tensor.scalar_type()));
}

inline void require_same_shape(const Tensor& tensor, const Tensor& reference, const char* name) {
  bool same = tensor.dim() == reference.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == reference.size(d);
  require(same, name, ": expected shape ", shape(reference), ", got ", shape(tensor));
}

// order[:n], each index checked to lie in [0, n_channels).
inline const int64_t* checked_order(const Tensor& order, int64_t n, int64_t n_channels) {
  require_cpu(order, "order");
  require(order.scalar_type() == ScalarType::Long, "order: expected dtype Long, got ",
          torch::headeronly::toString(order.scalar_type()));
  require(order.dim() == 1 && order.is_contiguous(),
          "order: expected a contiguous vector, got shape ", shape(order));
  require(0 <= n && n <= order.numel(), "n: expected 0 <= n <= ", order.numel(), ", got ", n);
  const int64_t* data = order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    require(0 <= data[i] && data[i] < n_channels, "order: expected 0 <= index < ", n_channels,
            ", got ", data[i]);
  }
  return data;
}

// Calls f with a value of the C++ type that dtype names.
template <class F>
void dispatch_floating(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      require(false, name, ": expected float32, float64, bfloat16 or float16, got ",
              torch::headeronly::toString(dtype));
  }
}

}  // namespace neq
