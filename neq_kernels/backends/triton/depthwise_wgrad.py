"""Weight and bias gradients of a depthwise convolution's active channels.

Every output channel reads one input channel, so there is no product of matrices: each program sums
all taps of a few channels over a part of the positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.triton.linear_wgrad import add_parts
from neq_kernels.backends.triton.tiles import is_wide, processors
from neq_kernels.problem import ConvGeometry

BLOCK_N, BLOCK_T = 16, 128
_PROGRAMS_EACH = 4


@triton.jit
def wgrad_kernel(
    dy,
    x,
    order,
    count,
    out,
    bias_out,
    t,
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
    t_per_split,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_POWER: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out``: float32 ``[splits, k, TAPS]``, of which the first ``count`` rows are written."""
    pn, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(count)
    if pn * BLOCK_N >= n:
        return
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rt = tl.arange(0, BLOCK_T)
    taps = tl.arange(0, TAPS_POWER)
    is_active = rn < n
    neurons = tl.load(order + rn, mask=is_active, other=0)
    if not WIDE:
        neurons = neurons.to(tl.int32)
    features, channels = neurons * dy_k, neurons // per_input * x_c
    along: tl.constexpr = 0 if CHANNELS_INSIDE else 1
    across: tl.constexpr = 1 - along
    features, channels = tl.expand_dims(features, along), tl.expand_dims(channels, along)
    active = tl.expand_dims(is_active, along)

    first = split * t_per_split
    last = tl.minimum(first + t_per_split, t)
    acc = tl.zeros((BLOCK_N, TAPS_POWER), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    pixels = out_height * out_width
    for at in range(first, last, BLOCK_T):
        is_position = at + rt < last
        position = tl.where(is_position, at + rt, first)
        image = position // pixels
        pixel = (position % pixels).to(tl.int32)
        p, q = pixel // out_width, pixel % out_width
        if WIDE:
            at_image, row = image, p.to(tl.int64)
        else:
            at_image, row = image.to(tl.int32), p
        at_dy = tl.expand_dims(at_image * dy_n + row * dy_p + q * dy_q, across)
        grad = tl.load(
            dy + features + at_dy, mask=active & tl.expand_dims(is_position, across), other=0.0
        ).to(tl.float32)
        if WITH_BIAS:
            sums += tl.sum(grad, axis=along)
        for tap in tl.static_range(TAPS):
            h = p * STRIDE_H + (tap // KERNEL_W * DILATION_H - PADDING_H)
            w = q * STRIDE_W + (tap % KERNEL_W * DILATION_W - PADDING_W)
            is_inside = is_position & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            h, w = tl.where(is_inside, h, 0), tl.where(is_inside, w, 0)
            row = h.to(tl.int64) if WIDE else h
            at_x = tl.expand_dims(at_image * x_n + row * x_h + w * x_w, across)
            inputs = tl.load(
                x + channels + at_x, mask=active & tl.expand_dims(is_inside, across), other=0.0
            ).to(tl.float32)
            # A NaN of a position outside the input must not reach the sum.
            products = tl.where(tl.expand_dims(is_inside, across), grad * inputs, 0.0)
            acc += tl.where((taps == tap)[None, :], tl.sum(products, axis=along)[:, None], 0.0)
    to = out + (split * k + rn)[:, None] * TAPS + taps[None, :]
    tl.store(to, acc, mask=is_active[:, None] & (taps < TAPS)[None, :])
    if WITH_BIAS:
        tl.store(bias_out + split * k + rn, sums, mask=is_active)


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
    taps, t = kernel_h * kernel_w, images * out_height * out_width
    tiles_n = -(-k // BLOCK_N)
    if splits is None:
        programs = _PROGRAMS_EACH * processors(input.device)
        splits = max(1, min(programs // -(-max(1, n) // BLOCK_N), -(-t // (4 * BLOCK_T))))
    t_per_split = max(1, -(-t // (splits * BLOCK_T))) * BLOCK_T
    out = torch.empty((splits, k, taps), dtype=torch.float32, device=weight.device)
    bias_out = out.new_empty((splits, k)) if want_bias else None
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(k) if want_bias else None
    wgrad_kernel[(tiles_n, splits)](
        grad_output,
        input,
        order,
        count,
        out,
        out if bias_out is None else bias_out,
        t,
        k,
        k // input.shape[1],
        *input.shape[2:],
        out_height,
        out_width,
        *grad_output.stride(),
        *input.stride(),
        t_per_split,
        KERNEL_W=kernel_w,
        TAPS=taps,
        TAPS_POWER=triton.next_power_of_2(taps),
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        CHANNELS_INSIDE=input.stride(1) == 1,
        WITH_BIAS=want_bias,
        WIDE=is_wide(grad_output, input),
        BLOCK_N=BLOCK_N,
        BLOCK_T=BLOCK_T,
    )
    add_parts(out, bias_out, order, count, grad_weight, grad_bias)
    return grad_weight, grad_bias
