"""Weight and bias gradients of a 2d convolution's active channels: an implicit split-K GEMM.

``dW[k, c, r, s]`` is the sum over n, p, q of ``dY[n, k, p, q] * X[n, c, h, w]`` with ``h = p *
stride - padding + r * dilation`` and w alike, for the active ``k``, accumulated in float32. One
program computes a tile of neurons and of input channels for one tap (r, s) and one part of the
reduction; ``linear_wgrad.add_parts_kernel`` adds the parts. Any strides: NCHW and channels_last are
served without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.triton.linear_wgrad import add_parts
from neq_kernels.backends.triton.tiles import Tiles, is_wide, precision, splits_for
from neq_kernels.problem import ConvGeometry


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
    t,
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
    t_per_split,
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
    BLOCK_T: tl.constexpr,
):
    """``c``: input channels of a group. ``DIRECT``: there is one part and ``out`` is the gradient,
    zeros included; else ``out`` is ``[splits, k, ...]`` in float32, active rows first."""
    tiles_n, tiles_c = tl.cdiv(per_group, BLOCK_N), tl.cdiv(c, BLOCK_C)
    tile = tl.program_id(0)
    pc = tile % tiles_c
    tap = tile // tiles_c % TAPS
    pn = tile // (tiles_c * TAPS) % tiles_n
    group = tile // (tiles_c * TAPS * tiles_n)
    split = tl.program_id(1).to(tl.int64)
    n = tl.load(count)
    # The active neurons of a group are neighbours in order, and so are its frozen ones.
    start, active = n * 0, n
    if GROUPED:
        start = first_at_least(order, n, group * per_group)
        active = first_at_least(order, n, (group + 1) * per_group) - start
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = pc * BLOCK_C + tl.arange(0, BLOCK_C)
    rt = tl.arange(0, BLOCK_T)
    is_neuron, is_active, is_channel = rn < per_group, rn < active, rc < c
    slot = tl.where(is_active, start + rn, n + group * per_group - start + rn - active)
    neurons = tl.load(order + slot, mask=is_neuron, other=0)
    # Masked lanes too get an address that exists: an asynchronous copy may touch it.
    features = tl.where(is_active, neurons, 0)
    channels = group * c + tl.where(is_channel, rc, 0)
    if WIDE:
        features, channels = features * dy_k, channels.to(tl.int64) * x_c
    else:
        features, channels = features.to(tl.int32) * dy_k, channels * x_c
    tap_h, tap_w = tap // KERNEL_W * DILATION_H - PADDING_H, tap % KERNEL_W * DILATION_W - PADDING_W

    first = split * t_per_split
    last = tl.minimum(first + t_per_split, t)
    if pn * BLOCK_N >= active:
        last = first
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    pixels = out_height * out_width
    for at in range(first, last, BLOCK_T):
        is_position = at + rt < last
        position = tl.where(is_position, at + rt, first)
        image = position // pixels
        pixel = (position % pixels).to(tl.int32)
        p, q = pixel // out_width, pixel % out_width
        h, w = p * STRIDE_H + tap_h, q * STRIDE_W + tap_w
        is_inside = is_position & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        h, w = tl.where(is_inside, h, 0), tl.where(is_inside, w, 0)
        if WIDE:
            at_dy = image * dy_n + p.to(tl.int64) * dy_p + q * dy_q
            at_x = image * x_n + h.to(tl.int64) * x_h + w * x_w
        else:
            at_dy = image.to(tl.int32) * dy_n + p * dy_p + q * dy_q
            at_x = image.to(tl.int32) * x_n + h * x_h + w * x_w
        if CHANNELS_INSIDE:
            a = tl.trans(
                tl.load(
                    dy + at_dy[:, None] + features[None, :],
                    mask=is_position[:, None] & is_active[None, :],
                    other=0.0,
                )
            )
            b = tl.load(
                x + at_x[:, None] + channels[None, :],
                mask=is_inside[:, None] & is_channel[None, :],
                other=0.0,
            )
        else:
            a = tl.load(
                dy + features[:, None] + at_dy[None, :],
                mask=is_active[:, None] & is_position[None, :],
                other=0.0,
            )
            b = tl.trans(
                tl.load(
                    x + channels[:, None] + at_x[None, :],
                    mask=is_channel[:, None] & is_inside[None, :],
                    other=0.0,
                )
            )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if WITH_BIAS:
            sums += tl.sum(a.to(tl.float32), axis=1)
    row_size = c * TAPS
    columns = rc * out_c + tap * out_tap
    if DIRECT:
        to = out + neurons[:, None] * row_size + columns[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=is_neuron[:, None] & is_channel[None, :])
        if WITH_BIAS and pc == 0 and tap == 0:
            tl.store(bias_out + neurons, sums.to(bias_out.dtype.element_ty), mask=is_neuron)
    else:
        to = out + (split * k + slot)[:, None] * row_size + columns[None, :]
        tl.store(to, acc, mask=is_active[:, None] & is_channel[None, :])
        if WITH_BIAS and pc == 0 and tap == 0:
            tl.store(bias_out + split * k + slot, sums, mask=is_active)


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
    images, _, out_height, out_width = grad_output.shape
    taps, t = kernel_h * kernel_w, images * out_height * out_width
    groups = geometry.groups
    per_group = k // groups
    tiles = tiles or Tiles.of(min(n, per_group), c)
    splits = splits or splits_for(tiles, n, c * taps, t, input.device)
    t_per_split = max(1, -(-t // (splits * tiles.block_t))) * tiles.block_t
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
        t,
        k,
        per_group,
        c,
        *input.shape[2:],
        out_height,
        out_width,
        *grad_output.stride(),
        *input.stride(),
        *((1, c) if last else (taps, 1)),
        t_per_split,
        KERNEL_W=kernel_w,
        TAPS=taps,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        GROUPED=groups > 1,
        CHANNELS_INSIDE=input.stride(1) == 1,
        DIRECT=direct,
        WITH_BIAS=want_bias,
        PRECISION=precision("conv"),
        WIDE=is_wide(grad_output, input),
        BLOCK_N=tiles.block_n,
        BLOCK_C=tiles.block_c,
        BLOCK_T=tiles.block_t,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if not direct:
        add_parts(out, bias_out, order, count, grad_weight, grad_bias)
    return grad_weight, grad_bias
