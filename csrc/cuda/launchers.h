// Launchers of the CUDA kernels. They queue work on a stream and return CUDA's error code; nothing
// is allocated and nobody waits. Pointers are to device memory; sizes and strides are in elements.
// `order` (int64, active neurons first, ascending) and `count` (int32, how many are active) are
// read on the device, so that a captured graph replays with other masks; `most` is what the host
// provides for.
#pragma once

#include <cstdint>

extern "C" {

// Of the current device.
int neq_cuda_multiprocessors(int32_t* count);

enum NeqDtype : int32_t { neq_float32, neq_float16, neq_bfloat16 };

// packed[t, i] = rows[t, order[i]] for i < count, of [t, most]; transposed: [most, t]. Rows of both
// matrices start at multiples of 16 bytes. Elements of `packed` up to the next multiple of 16 bytes
// behind the active ones may be written. `sums`, float[blocks, most] or null: of each channel, of
// the rows that each of the `blocks` takes.
int neq_cuda_pack(int32_t dtype, const void* rows, int64_t stride, const int64_t* order,
                  const int32_t* count, void* packed, int64_t packed_stride, float* sums,
                  int32_t blocks, int64_t t, int32_t most, int32_t transposed, void* stream);

// Rows of a step of neq_cuda_pack.
int64_t neq_cuda_pack_rows();

// How a product is cut: neurons and columns of a block's tile, rows of a step.
struct NeqTile {
  int32_t neurons, columns, rows;
};

// What neq_cuda_linear_wgrad will choose. `packed`: dY comes from neq_cuda_pack.
NeqTile neq_cuda_tile(int32_t dtype, int32_t most, int64_t columns, int32_t packed);

// parts[part, i, c] = sum over the rows t of the part of dY[t, order[i]] * X[t, c], i < count, and
// bias_parts[part, i] (or null) those of dY alone. Rows of dY and X start at multiples of 16 bytes,
// c is a multiple of 16 bytes; t_per_part is one of the tile's rows.
int neq_cuda_linear_wgrad(int32_t dtype, const void* dy, int64_t dy_stride, const void* x,
                          int64_t x_stride, const int64_t* order, const int32_t* count,
                          float* parts, float* bias_parts, int64_t t, int64_t t_per_part, int64_t c,
                          int32_t most, int32_t packed, void* stream);

// The same of a 2d convolution whose channels lie innermost: t, below 2**31, counts output pixels,
// and parts are [part, i, tap, c]. `geometry`: height, width, out_height, out_width, kernel_height,
// kernel_width, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w.
int neq_cuda_conv_wgrad(int32_t dtype, const void* dy, int64_t dy_stride, const void* x,
                        const int64_t* x_strides, const int32_t* geometry, const int64_t* order,
                        const int32_t* count, float* parts, float* bias_parts, int64_t t,
                        int64_t t_per_part, int64_t c, int32_t most, int32_t packed, void* stream);

// What a block of neq_cuda_few_rows_conv takes of X at a time: lines, columns of pixels, channels.
struct NeqRectangle {
  int32_t height, width, channels;
};

// Of images of this width with c channels.
NeqRectangle neq_cuda_few_rows_conv_rectangle(int32_t dtype, int64_t c, int32_t width);

// The same of a 3 x 3 convolution without stride or dilation, and with a padding of at most 2, in
// one pass over X, for at most 16 neurons. `order` is null where dY comes from neq_cuda_pack.
// `sizes`: height, width, out_height, out_width, padding_h, padding_w. All `most_parts` parts
// are written, some maybe with zeros.
int neq_cuda_few_rows_conv(int32_t dtype, const void* dy, int64_t dy_stride, const void* x,
                           const int64_t* x_strides, const int32_t* sizes, const int64_t* order,
                           const int32_t* count, float* parts, float* bias_parts,
                           int32_t most_parts, int64_t c, int32_t images, int32_t most,
                           void* stream);

// grad[order[i]] = sum over parts, in order, for i < count; 0 for the others of k. Where c is what
// a tap has, a neuron's element (tap, c) lies at tap * tap_stride + c * c_stride of its row, which
// has fewer than 2**31. c is a multiple of 4. `from` is the dtype of the parts.
int neq_cuda_finish(int32_t from, int32_t dtype, const void* parts, const void* bias_parts,
                    const int64_t* order, const int32_t* count, void* grad, void* bias, int64_t k,
                    int64_t c, int64_t c_stride, int64_t tap_stride, int32_t number_of_parts,
                    int32_t number_of_bias_parts, int32_t most, int32_t taps, void* stream);

// SGD steps of the active neurons of many parameters. `addresses` and `shapes` are tables on the
// device, see row_steps.cuh and backends/triton/multi_tensor.py; `blocks` as the tables say.
// Without step counts no step is a first one; without momentum they are not looked at.
int neq_cuda_sgd_rows(int32_t dtype, const int64_t* addresses, const int64_t* shapes,
                      int32_t parameters, int64_t blocks, double lr, double momentum,
                      double dampening, double weight_decay, int32_t with_momentum,
                      int32_t nesterov, int32_t maximize, void* stream);

// Adam steps, likewise; `decoupled` is AdamW.
int neq_cuda_adam_rows(int32_t dtype, const int64_t* addresses, const int64_t* shapes,
                       int32_t parameters, int64_t blocks, double lr, double beta1, double beta2,
                       double eps, double weight_decay, int32_t amsgrad, int32_t decoupled,
                       int32_t maximize, void* stream);

// How a depthwise weight gradient is cut: output rows of a band, and parts.
struct NeqDepthwiseCut {
  int32_t rows, parts;
};

// What neq_cuda_depthwise_wgrad is best given, to run about `blocks` blocks. `channels_inside`:
// channels lie innermost in memory, not pixels.
NeqDepthwiseCut neq_cuda_depthwise_cut(int32_t dtype, const int32_t* geometry, int32_t images,
                                       int32_t most, int32_t channels_inside, int32_t blocks);

// parts[part, i, tap] and bias_parts[part, i] (or null) of a 2d convolution whose X has `channels`
// channels, each read by k / channels neighbours of the k of dY. Strides are those of image,
// channel, row and column, `geometry` is that of neq_cuda_conv_wgrad. All parts are written, some
// maybe with zeros.
int neq_cuda_depthwise_wgrad(int32_t dtype, const void* dy, const int64_t* dy_strides,
                             const void* x, const int64_t* x_strides, const int32_t* geometry,
                             const int64_t* order, const int32_t* count, float* parts,
                             float* bias_parts, int32_t images, int32_t k, int32_t channels,
                             int32_t rows, int32_t number_of_parts, int32_t most, void* stream);

// grad[order[i], tap] and bias[order[i]] (or null) = the sum of the parts, in order, for i < count;
// 0 for the others of k.
int neq_cuda_depthwise_finish(int32_t dtype, const float* parts, const float* bias_parts,
                              const int64_t* order, const int32_t* count, void* grad, void* bias,
                              int64_t k, int32_t taps, int32_t number_of_parts, int32_t most,
                              void* stream);
}
