"""Weight and bias gradients of a 2d convolution's active channels: an implicit split-K GEMM.

``dW[k, c, r, s]`` is the sum over n, p, q of ``dY[n, k, p, q] * X[n, c, h, w]`` with ``h = p *
stride - padding + r * dilation`` and w alike, for the active ``k``, accumulated in float32. One
program computes a tile of neurons and of input channels for one tap (r, s) and one part of the
reduction; ``linear_wgrad.add_parts_kernel`` adds the parts. Any strides: NCHW and channels_last are
read without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.backends.triton.linear_wgrad import add_parts, linear_wgrad
from neq_kernels.backends.triton.tiles import (
    Tiles,
    architecture,
    choices,
    is_wide,
    precision,
    rectangle,
    splits_for,
)


@triton.jit
def first_at_least(order, n, value):
    """Where ``value`` belongs in the ascending ``order[:n]``."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        if tl.load(order + middle) < value:
            low = middle + 1
        else:
            high = middle
    return low


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
    per_group,
    c,
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
    out_c,
    out_tap,
    tiles_per_split,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPED: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    DIRECT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A step of the reduction is a rectangle of output pixels, so that only scalars are divided.

    ``c``: input channels of a group. ``DIRECT``: there is one part and ``out`` is the gradient,
    zeros included; else ``out`` is ``[splits, k, ...]`` in float32, active rows first."""
    tiles_n, tiles_c = tl.cdiv(per_group, BLOCK_N), tl.cdiv(c, BLOCK_C)
    tile = tl.program_id(0)
    pc = tile % tiles_c
    tap = tile // tiles_c % TAPS
    pn = tile // (tiles_c * TAPS) % tiles_n
    group = tile // (tiles_c * TAPS * tiles_n)
    split = tl.program_id(1)
    n = tl.load(count)
    # The active neurons of a group are neighbours in order, and so are its frozen ones.
    start, active = n * 0, n
    if GROUPED:
        start = first_at_least(order, n, group * per_group)
        active = first_at_least(order, n, (group + 1) * per_group) - start
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = pc * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_P * BLOCK_Q)
    rp, rq = pixel // BLOCK_Q, pixel % BLOCK_Q
    is_neuron, is_active, is_channel = rn < per_group, rn < active, rc < c
    slot = tl.where(is_active, start + rn, n + group * per_group - start + rn - active)
    neurons = tl.load(order + slot, mask=is_neuron, other=0)
    features = tl.where(is_active, neurons, 0)
    channels = group * c + rc
    if WIDE:
        channels, rp_at, rq_at = channels.to(tl.int64), rp.to(tl.int64), rq.to(tl.int64)
    else:
        features, rp_at, rq_at = features.to(tl.int32), rp, rq
    features, channels = features * dy_k, channels * x_c
    tap_h, tap_w = tap // KERNEL_W * DILATION_H - PADDING_H, tap % KERNEL_W * DILATION_W - PADDING_W
    at_dy = rp_at * dy_p + rq_at * dy_q
    at_x = rp_at * STRIDE_H * x_h + rq_at * STRIDE_W * x_w
    if CHANNELS_INSIDE:
        at_dy = at_dy[:, None] + features[None, :]
        at_x = at_x[:, None] + channels[None, :]
        sums = tl.zeros((BLOCK_P * BLOCK_Q, BLOCK_N), tl.float32)
    else:
        at_dy = features[:, None] + at_dy[None, :]
        at_x = channels[:, None] + at_x[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_P * BLOCK_Q), tl.float32)

    tiles_p, tiles_q = tl.cdiv(out_height, BLOCK_P), tl.cdiv(out_width, BLOCK_Q)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, images * tiles_p * tiles_q)
    if pn * BLOCK_N >= active:
        last = first
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for at in range(first, last):
        image = (at // (tiles_p * tiles_q)).to(tl.int64)
        p, q = at // tiles_q % tiles_p * BLOCK_P, at % tiles_q * BLOCK_Q
        h, w = p * STRIDE_H + tap_h, q * STRIDE_W + tap_w
        from_dy = dy + (image * dy_n + p.to(tl.int64) * dy_p + q * dy_q)
        from_x = x + (image * x_n + h.to(tl.int64) * x_h + w * x_w)
        h, w = h + rp * STRIDE_H, w + rq * STRIDE_W
        is_pixel = (p + rp < out_height) & (q + rq < out_width)
        is_inside = is_pixel & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        if CHANNELS_INSIDE:
            is_dy = is_pixel[:, None] & is_active[None, :]
            grad = tl.load(from_dy + at_dy, mask=is_dy, other=0.0)
            is_x = is_inside[:, None] & is_channel[None, :]
            inputs = tl.load(from_x + at_x, mask=is_x, other=0.0)
            acc = tl.dot(tl.trans(grad), inputs, acc, input_precision=PRECISION)
        else:
            is_dy = is_active[:, None] & is_pixel[None, :]
            grad = tl.load(from_dy + at_dy, mask=is_dy, other=0.0)
            is_x = is_channel[:, None] & is_inside[None, :]
            inputs = tl.load(from_x + at_x, mask=is_x, other=0.0)
            acc = tl.dot(grad, tl.trans(inputs), acc, input_precision=PRECISION)
        if WITH_BIAS:
            sums += grad.to(tl.float32)
    bias = tl.sum(sums, axis=0 if CHANNELS_INSIDE else 1)
    row_size = c * TAPS
    columns = rc * out_c + tap * out_tap
    if DIRECT:
        to = out + neurons[:, None] * row_size + columns[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=is_neuron[:, None] & is_channel[None, :])
        if WITH_BIAS and pc == 0 and tap == 0:
            tl.store(bias_out + neurons, bias.to(bias_out.dtype.element_ty), mask=is_neuron)
    else:
        slot += split.to(tl.int64) * k
        to = out + slot[:, None] * row_size + columns[None, :]
        tl.store(to, acc, mask=is_active[:, None] & is_channel[None, :])
        if WITH_BIAS and pc == 0 and tap == 0:
            tl.store(bias_out + slot, bias, mask=is_active)


def conv_wgrad(
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
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients like ``weight`` (contiguous or channels_last) and its bias, exact zeros in the rows
    of frozen channels.

    Args:
        grad_output: ``[N, K, P, Q]``, any strides.
        input: ``[N, Cin, H, W]`` of the same dtype, any strides.
        weight: ``[K, Cin/groups, R, S]``: gives dtype, shape and memory format.
        geometry: of a 2d convolution that is not transposed.
        order, count, n, want_bias, splits, tiles: as for ``linear_wgrad``.
    """
    k, c, kernel_h, kernel_w = weight.shape
    taps, groups = kernel_h * kernel_w, geometry.groups
    if taps == 1 and max(geometry.stride) == 1 and max(geometry.padding) == 0:
        dy, x = (_rows_of_pixels(t) for t in (grad_output, input))
        if groups == 1 and dy is not None and x is not None:
            grad, grad_bias = linear_wgrad(
                dy,
                x,
                weight.flatten(1),
                order,
                count,
                n,
                want_bias,
                splits=splits,
                tiles=tiles,
                operation="conv",
            )
            return grad.as_strided(weight.shape, weight.stride()), grad_bias
        # As one row of pixels no step of the reduction is cut short at the end of a row.
        grad_output, input = (t.flatten(2).unsqueeze(2) for t in (grad_output, input))
    images, _, out_height, out_width = grad_output.shape
    per_group = k // groups
    arch = architecture(input.device)
    how = precision("conv", input.dtype, arch)
    scattered = input.stride(1) != 1
    if tiles is None:
        tiles = choices(min(n, per_group), c, input.dtype, how, arch, scattered=scattered)[0]
    block_p, block_q, total = rectangle(tiles.block_t, images, out_height, out_width)
    splits = splits or splits_for(tiles, n, c * taps, total * tiles.block_t, input.device)
    tiles_per_split = -(-total // splits)
    splits = -(-total // tiles_per_split)
    direct = splits == 1
    last = not weight.is_contiguous()
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(k) if want_bias else None
    out, bias_out = grad_weight, grad_bias
    if not direct:
        out = torch.empty((splits, k, c * taps), dtype=torch.float32, device=weight.device)
        bias_out = out.new_empty((splits, k)) if want_bias else None
    grid = (groups * -(-per_group // tiles.block_n) * taps * -(-c // tiles.block_c), splits)
    wgrad_kernel[grid](
        grad_output,
        input,
        order,
        count,
        out,
        out if bias_out is None else bias_out,
        images,
        k,
        per_group,
        c,
        *input.shape[2:],
        out_height,
        out_width,
        *grad_output.stride(),
        *input.stride(),
        *((1, c) if last else (taps, 1)),
        tiles_per_split,
        KERNEL_W=kernel_w,
        TAPS=taps,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        GROUPED=groups > 1,
        CHANNELS_INSIDE=not scattered,
        DIRECT=direct,
        WITH_BIAS=want_bias,
        PRECISION=how,
        WIDE=is_wide(grad_output, input),
        BLOCK_N=tiles.block_n,
        BLOCK_C=tiles.block_c,
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if not direct:
        add_parts(out, bias_out, order, count, grad_weight, grad_bias)
    return grad_weight, grad_bias


def _rows_of_pixels(images: Tensor) -> Tensor | None:
    """``[N * H * W, C]``, a view; None where the pixels do not lie one after the other."""
    pixels = images.movedim(1, -1)
    return pixels.flatten(0, -2) if pixels.is_contiguous() else None
