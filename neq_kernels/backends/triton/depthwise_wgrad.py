"""Weight and bias gradients of a depthwise convolution's active channels.

Every output channel reads one input channel, so there is no product of matrices: each program sums
one row of taps of a few channels over a part of the pixels, in a tile of its own registers that is
added up at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.backends.triton.linear_wgrad import add_parts
from neq_kernels.backends.triton.tiles import is_wide, processors, rectangle

BLOCK_N, _TILE = 16, 2048
_PROGRAMS_EACH = 4


@triton.jit
def wgrad_kernel(
    dy,
    x,
    order,
    count,
    out,
    bias_out,
    images,
    k,
    per_input,
    height,
    width,
    out_height,
    out_width,
    dy_n,
    dy_k,
    dy_p,
    dy_q,
    x_n,
    x_c,
    x_h,
    x_w,
    tiles_per_split,
    KERNEL_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """``out``: float32 ``[splits, k, taps]``, of which the first ``count`` rows are written."""
    pn, tap_row = tl.program_id(0) // KERNEL_H, tl.program_id(0) % KERNEL_H
    split = tl.program_id(1)
    n = tl.load(count)
    if pn * BLOCK_N >= n:
        return
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.arange(0, BLOCK_P * BLOCK_Q)
    rp, rq = pixel // BLOCK_Q, pixel % BLOCK_Q
    is_active = rn < n
    neurons = tl.load(order + rn, mask=is_active, other=0)
    rp_at, rq_at = rp, rq
    if WIDE:
        rp_at, rq_at = rp.to(tl.int64), rq.to(tl.int64)
    else:
        neurons = neurons.to(tl.int32)
    features, channels = neurons * dy_k, neurons // per_input * x_c
    # What lies innermost in memory is the last dimension of a tile.
    along: tl.constexpr = 0 if CHANNELS_INSIDE else 1
    across: tl.constexpr = 1 - along
    at_dy = rp_at * dy_p + rq_at * dy_q
    at_x = rp_at * STRIDE_H * x_h + rq_at * STRIDE_W * x_w
    at_dy = tl.expand_dims(features, along) + tl.expand_dims(at_dy, across)
    at_x = tl.expand_dims(channels, along) + tl.expand_dims(at_x, across)
    rw = tl.arange(0, BLOCK_W)
    at_x = at_x[None, :, :] + (rw * DILATION_W * x_w)[:, None, None]
    active = tl.expand_dims(is_active, along)
    tap_h = tap_row * DILATION_H - PADDING_H

    tiles_p, tiles_q = tl.cdiv(out_height, BLOCK_P), tl.cdiv(out_width, BLOCK_Q)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, images * tiles_p * tiles_q)
    acc = tl.zeros(at_x.shape, tl.float32)
    sums = tl.zeros(at_dy.shape, tl.float32)
    for at in range(first, last):
        image = (at // (tiles_p * tiles_q)).to(tl.int64)
        p, q = at // tiles_q % tiles_p * BLOCK_P, at % tiles_q * BLOCK_Q
        h, w = p * STRIDE_H + tap_h, q * STRIDE_W - PADDING_W
        from_dy = dy + (image * dy_n + p.to(tl.int64) * dy_p + q * dy_q)
        from_x = x + (image * x_n + h.to(tl.int64) * x_h + w * x_w)
        is_pixel = (p + rp < out_height) & (q + rq < out_width)
        is_dy = active & tl.expand_dims(is_pixel, across)
        grad = tl.load(from_dy + at_dy, mask=is_dy, other=0.0).to(tl.float32)
        h = h + rp * STRIDE_H
        w = (w + rq * STRIDE_W)[None, :] + (rw * DILATION_W)[:, None]
        is_inside = (is_pixel & (h >= 0) & (h < height))[None, :] & (w >= 0) & (w < width)
        is_inside = is_inside & (rw < KERNEL_W)[:, None]
        is_x = tl.expand_dims(is_inside, across + 1) & active[None, :, :]
        inputs = tl.load(from_x + at_x, mask=is_x, other=0.0).to(tl.float32)
        # A NaN of a position outside the input must not reach the sum.
        acc += tl.where(is_x, grad[None, :, :] * inputs, 0.0)
        if WITH_BIAS:
            sums += grad
    rows = split.to(tl.int64) * k + rn
    to = out + rows[None, :] * (KERNEL_H * KERNEL_W) + (tap_row * KERNEL_W + rw)[:, None]
    mask = is_active[None, :] & (rw < KERNEL_W)[:, None]
    tl.store(to, tl.sum(acc, axis=along + 1), mask=mask)
    if WITH_BIAS and tap_row == 0:
        tl.store(bias_out + rows, tl.sum(sums, axis=along), mask=is_active)


def depthwise_wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    count: Tensor,
    n: int,
    want_bias: bool,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients like ``weight`` and its bias, exact zeros in the rows of frozen channels.

    Args:
        grad_output: ``[N, K, P, Q]``, K a multiple of Cin; any strides.
        input: ``[N, Cin, H, W]`` of the same dtype, any strides.
        weight: ``[K, 1, R, S]``.
        geometry: of a 2d convolution with ``groups == Cin``.
        order, count, n, want_bias, splits: as for ``linear_wgrad``.
    """
    k, _, kernel_h, kernel_w = weight.shape
    images, _, out_height, out_width = grad_output.shape
    taps = kernel_h * kernel_w
    block_w = triton.next_power_of_2(kernel_w)
    block_t = max(1, _TILE // (BLOCK_N * block_w))
    block_p, block_q, total = rectangle(block_t, images, out_height, out_width)
    if splits is None:
        programs = _PROGRAMS_EACH * processors(input.device)
        splits = max(1, min(programs // (-(-max(1, n) // BLOCK_N) * kernel_h), -(-total // 4)))
    tiles_per_split = -(-total // splits)
    splits = -(-total // tiles_per_split)
    out = torch.empty((splits, k, taps), dtype=torch.float32, device=weight.device)
    bias_out = out.new_empty((splits, k)) if want_bias else None
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(k) if want_bias else None
    wgrad_kernel[(-(-k // BLOCK_N) * kernel_h, splits)](
        grad_output,
        input,
        order,
        count,
        out,
        out if bias_out is None else bias_out,
        images,
        k,
        k // input.shape[1],
        *input.shape[2:],
        out_height,
        out_width,
        *grad_output.stride(),
        *input.stride(),
        tiles_per_split,
        KERNEL_W=kernel_w,
        KERNEL_H=kernel_h,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        CHANNELS_INSIDE=input.stride(1) == 1,
        WITH_BIAS=want_bias,
        WIDE=is_wide(grad_output, input),
        BLOCK_W=block_w,
        BLOCK_N=BLOCK_N,
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
    )
    add_parts(out, bias_out, order, count, grad_weight, grad_bias)
    return grad_weight, grad_bias
