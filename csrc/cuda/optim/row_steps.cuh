// SGD and Adam steps of the active neurons of many parameters, in one launch. A block finds in two
// tables which neurons are its own and where they lie; it alone reads and advances their step
// counts. What it has of a tensor is read and written 16 bytes at a time where neurons lie in whole
// vectors.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/elements.cuh"
#include "../common/ptx.cuh"

namespace neq::cuda {

constexpr int kStepThreads = 128, kMostStepNeurons = 512;
constexpr int kShapeNumbers = 6, kSgdAddresses = 5, kAdamAddresses = 7;

// `addresses` is int64[number, kSgdAddresses or kAdamAddresses]: of a parameter's tensors, 0 for
// one that is missing. `shapes` is int64[number, kShapeNumbers]: how many neurons are active;
// outer, per_group and inner: element i of part o of neuron (g, j) lies at
// ((g * outer + o) * per_group + j) * inner + i; how many neurons a block takes, at most
// kMostStepNeurons; the parameter's first block.
struct ManyParameters {
  const int64_t* addresses;
  const int64_t* shapes;
  int number;
};

// The neurons of this block. They have less than 2**31 elements together.
class StepNeurons {
 public:
  __device__ __forceinline__ explicit StepNeurons(const ManyParameters& all) {
    const int64_t block = blockIdx.x;
    int end = all.number;
    parameter = 0;
    while (end - parameter > 1) {
      const int middle = (parameter + end) / 2;
      (all.shapes[middle * kShapeNumbers + 5] > block ? end : parameter) = middle;
    }
    const int64_t* shape = all.shapes + parameter * kShapeNumbers;
    outer_ = static_cast<int>(shape[1]);
    per_group_ = static_cast<int>(shape[2]);
    inner_ = static_cast<int>(shape[3]);
    first = (block - shape[5]) * shape[4];
    count = static_cast<int>(smaller(shape[4], shape[0] - first));
  }

  // Where a neuron's first element lies.
  __device__ __forceinline__ int64_t place(int64_t neuron) const {
    const int number = static_cast<int>(neuron), group = number / per_group_;
    return (static_cast<int64_t>(group) * outer_ * per_group_ + number % per_group_) * inner_;
  }

  // `step(width, at, i)` for all elements of the neurons, `width` at a time: those from `at` on,
  // which are neuron i's. `together` are the tensors' addresses, or-ed. Neighbouring threads have
  // neighbours: of one neuron, then of the next, then of the next outer index.
  template <class T, class Neuron, class Step>
  __device__ __forceinline__ void each(const Neuron* neurons, int64_t together,
                                       const Step& step) const {
    if (inner_ % kVector<T> == 0 && together % kVectorBytes == 0) {
      each_of_width<kVector<T>>(neurons, step);
    } else {
      each_of_width<1>(neurons, step);
    }
  }

  int parameter, count;
  int64_t first;  // of the order

 private:
  template <int kWidth, class Neuron, class Step>
  __device__ __forceinline__ void each_of_width(const Neuron* neurons, const Step& step) const {
    const int run = inner_ / kWidth, end = outer_ * count * run;
    for (int i = static_cast<int>(threadIdx.x); i < end; i += kStepThreads) {
      const int part = i / run, neuron = part % count;
      const int64_t outer = static_cast<int64_t>(part / count) * per_group_ * inner_;
      step(std::integral_constant<int, kWidth>{}, neurons[neuron].at + outer + i % run * kWidth,
           neuron);
    }
  }

  int outer_, per_group_, inner_;
};

// One element, as Neighbours.
template <class T>
struct Single {
  T value;

  static __device__ __forceinline__ Single load(const T* from) { return {*from}; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ T& operator[](int) { return value; }
};

template <class T, int kWidth>
using Elements = std::conditional_t<kWidth == 1, Single<T>, Vector<T>>;

template <class T>
__device__ __forceinline__ T* tensor_at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// --- SGD -----------------------------------------------------------------------------------------

// Addresses: parameter, gradient, momentum buffer, step counts (int64, or missing), order.
// A neuron that has not taken a step yet starts its buffer with its gradient.
template <class T>
struct SgdRows {
  ManyParameters parameters;
  float lr, momentum, grad_share, weight_decay, grad_sign;
  bool nesterov;
};

struct SgdNeuron {
  int64_t at;
  int64_t is_first;
};

template <class T, bool kMomentum>
__global__ void __launch_bounds__(kStepThreads) sgd_rows_kernel(SgdRows<T> s) {
  const StepNeurons mine(s.parameters);
  const int64_t* address = s.parameters.addresses + mine.parameter * kSgdAddresses;
  auto* const param = tensor_at<T>(address[0]);
  const auto* const grad = tensor_at<const T>(address[1]);
  auto* const buffer = tensor_at<T>(address[2]);
  auto* const steps = tensor_at<int64_t>(address[3]);
  const auto* const order = tensor_at<const int64_t>(address[4]) + mine.first;
  auto* const neurons = reinterpret_cast<SgdNeuron*>(ptx::dynamic_shared());
  for (int i = static_cast<int>(threadIdx.x); i < mine.count; i += kStepThreads) {
    const int64_t neuron = order[i];
    neurons[i].at = mine.place(neuron);
    if constexpr (kMomentum) {
      const int64_t before = steps == nullptr ? 1 : steps[neuron];
      neurons[i].is_first = before == 0;
      if (steps != nullptr) steps[neuron] = before + 1;
    }
  }
  __syncthreads();
  const int64_t together = address[0] | address[1] | (kMomentum ? address[2] : 0);
  mine.each<T>(neurons, together, [&](auto width, int64_t at, int i) {
    constexpr int kWidth = decltype(width)::value;
    using Some = Elements<T, kWidth>;
    Some p = Some::load(param + at), g = Some::load(grad + at), b = p;
    if constexpr (kMomentum) b = Some::load(buffer + at);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = to_float(p[j]);
      float update = s.grad_sign * to_float(g[j]) + s.weight_decay * value;
      if constexpr (kMomentum) {
        float sum = s.momentum * to_float(b[j]) + s.grad_share * update;
        if (neurons[i].is_first != 0) sum = update;
        b[j] = from_float<T>(sum);
        update = s.nesterov ? update + s.momentum * sum : sum;
      }
      p[j] = from_float<T>(value - s.lr * update);
    }
    if constexpr (kMomentum) b.store(buffer + at);
    p.store(param + at);
  });
}

// --- Adam ----------------------------------------------------------------------------------------

// Addresses: parameter, gradient, first and second moment, largest second moment (amsgrad), step
// counts (int64), order.
template <class T>
struct AdamRows {
  ManyParameters parameters;
  float lr, log_beta1, log_beta2, beta1, beta1_rest, beta2, beta2_rest;
  float eps, weight_decay, decay_factor, grad_sign;
};

// What corrects the bias of the moments: the step size, and what the root of the second moment is
// multiplied by.
struct AdamNeuron {
  int64_t at;
  float step_size, root_scale;
};

// 1 - beta**count; the difference itself would cancel all digits.
__device__ __forceinline__ float one_minus_power(float log_beta, int64_t count) {
  return -expm1f(log_beta * static_cast<float>(count));
}

template <class T, bool kAmsgrad>
__global__ void __launch_bounds__(kStepThreads) adam_rows_kernel(AdamRows<T> s) {
  const StepNeurons mine(s.parameters);
  const int64_t* address = s.parameters.addresses + mine.parameter * kAdamAddresses;
  auto* const param = tensor_at<T>(address[0]);
  const auto* const grad = tensor_at<const T>(address[1]);
  auto* const first = tensor_at<T>(address[2]);
  auto* const second = tensor_at<T>(address[3]);
  auto* const largest = tensor_at<T>(address[4]);
  auto* const steps = tensor_at<int64_t>(address[5]);
  const auto* const order = tensor_at<const int64_t>(address[6]) + mine.first;
  auto* const neurons = reinterpret_cast<AdamNeuron*>(ptx::dynamic_shared());
  for (int i = static_cast<int>(threadIdx.x); i < mine.count; i += kStepThreads) {
    const int64_t neuron = order[i], count = steps[neuron] + 1;
    steps[neuron] = count;
    neurons[i].at = mine.place(neuron);
    neurons[i].step_size = s.lr / one_minus_power(s.log_beta1, count);
    neurons[i].root_scale = 1.0f / sqrtf(one_minus_power(s.log_beta2, count));
  }
  __syncthreads();
  const int64_t together = address[0] | address[1] | address[2] | address[3] | address[4];
  mine.each<T>(neurons, together, [&](auto width, int64_t at, int i) {
    constexpr int kWidth = decltype(width)::value;
    using Some = Elements<T, kWidth>;
    Some p = Some::load(param + at), g = Some::load(grad + at);
    Some m = Some::load(first + at), v = Some::load(second + at), most = v;
    if constexpr (kAmsgrad) most = Some::load(largest + at);
    const float step_size = neurons[i].step_size, root_scale = neurons[i].root_scale;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = to_float(p[j]) * s.decay_factor;
      const float gradient = s.grad_sign * to_float(g[j]) + s.weight_decay * value;
      // As torch.lerp: the rounding of what is small does not count.
      const float moment = to_float(m[j]), difference = gradient - moment;
      const float mean =
          s.beta1 > 0.5f ? moment + s.beta1_rest * difference : gradient - s.beta1 * difference;
      float square = to_float(v[j]) * s.beta2 + s.beta2_rest * gradient * gradient;
      m[j] = from_float<T>(mean);
      v[j] = from_float<T>(square);
      if constexpr (kAmsgrad) {
        const float before = to_float(most[j]);
        if (before > square) square = before;
        most[j] = from_float<T>(square);
      }
      p[j] = from_float<T>(value - step_size * mean / (sqrtf(square) * root_scale + s.eps));
    }
    m.store(first + at);
    v.store(second + at);
    if constexpr (kAmsgrad) most.store(largest + at);
    p.store(param + at);
  });
}

}  // namespace neq::cuda
