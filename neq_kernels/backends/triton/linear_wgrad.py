"""Weight and bias gradients of a linear layer's active features: a split-K GEMM.

``dW[order[i], c] = sum over t of dY[t, order[i]] * X[t, c]``, accumulated in float32 whatever the
operands' dtype. The reduction over ``t`` is cut into ``splits`` parts that one program each sums; a
second kernel adds the parts in a fixed order, so the bits do not depend on the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.triton import packed_wgrad
from neq_kernels.backends.triton.tiles import (
    Operation,
    Tiles,
    architecture,
    choices,
    is_wide,
    precision,
    splits_for,
)


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
    c,
    stride_dy_t,
    stride_dy_n,
    stride_x_t,
    t_per_split,
    DIRECT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of rows and columns, for one part of the reduction.

    ``DIRECT``: there is one part, and ``out`` is the gradient, zeros included; else ``out`` is
    ``[splits, k, c]`` in float32, of which the first ``count`` rows are written.
    """
    tiles_c = tl.cdiv(c, BLOCK_C)
    pn, pc = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    split = tl.program_id(1).to(tl.int64)
    n = tl.load(count)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = pc * BLOCK_C + tl.arange(0, BLOCK_C)
    rt = tl.arange(0, BLOCK_T)
    is_active = rn < n
    is_column = rc < c
    neurons = tl.load(order + rn, mask=rn < k, other=0)
    features = tl.where(is_active, neurons, 0)
    features = (features if WIDE else features.to(tl.int32)) * stride_dy_n

    first = split * t_per_split
    last = tl.minimum(first + t_per_split, t)
    if pn * BLOCK_N >= n:
        last = first
    dy += first * stride_dy_t
    x += first * stride_x_t
    at_dy = (rt * stride_dy_t)[:, None] + features[None, :]
    at_x = (rt * stride_x_t)[:, None] + rc[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for at in range(first, last, BLOCK_T):
        is_row = (at + rt < last)[:, None]
        a = tl.load(dy + at_dy, mask=is_row & is_active[None, :], other=0.0)
        b = tl.load(x + at_x, mask=is_row & is_column[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if WITH_BIAS:
            sums += a.to(tl.float32)
        dy += BLOCK_T * stride_dy_t
        x += BLOCK_T * stride_x_t
    bias = tl.sum(sums, axis=0)
    if DIRECT:
        is_written = (rn < k)[:, None] & is_column[None, :]
        to = out + neurons[:, None] * c + rc[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=is_written)
        if WITH_BIAS and pc == 0:
            tl.store(bias_out + neurons, bias.to(bias_out.dtype.element_ty), mask=rn < k)
    else:
        to = out + split * k * c + (rn.to(tl.int64) * c)[:, None] + rc[None, :]
        tl.store(to, acc, mask=is_active[:, None] & is_column[None, :])
        if WITH_BIAS and pc == 0:
            tl.store(bias_out + split * k + rn, bias, mask=is_active)


@triton.jit
def add_parts_kernel(
    parts,
    bias_parts,
    order,
    count,
    out,
    bias_out,
    k,
    c,
    splits,
    WITH_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the parts of a reduction, in order, into the rows of the gradient; the others are 0."""
    pn, pc = tl.program_id(0), tl.program_id(1)
    n = tl.load(count)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = pc * BLOCK_C + tl.arange(0, BLOCK_C)
    is_active = (rn < n)[:, None] & (rc < c)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    part = parts + rn.to(tl.int64)[:, None] * c + rc[None, :]
    bias_part = bias_parts + rn
    size = (tl.zeros((), tl.int64) + k) * c
    if pn * BLOCK_N < n:
        for _ in range(splits):
            acc += tl.load(part, mask=is_active, other=0.0)
            part += size
            if WITH_BIAS:
                sums += tl.load(bias_part, mask=rn < n, other=0.0)
                bias_part += k
    rows = tl.load(order + rn, mask=rn < k, other=0)
    to = out + rows[:, None] * c + rc[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rn < k)[:, None] & (rc < c)[None, :])
    if WITH_BIAS and pc == 0:
        tl.store(bias_out + rows, sums.to(bias_out.dtype.element_ty), mask=rn < k)


def linear_wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    n: int,
    want_bias: bool,
    *,
    splits: int | None = None,
    tiles: Tiles | None = None,
    operation: Operation = "matmul",
) -> tuple[Tensor, Tensor | None]:
    """Gradients like ``weight`` and its bias, exact zeros in the rows of frozen features.

    Args:
        grad_output: ``[T, K]``, any strides.
        input: ``[T, C]`` of the same dtype: float16, bfloat16 or float32.
        weight: ``[K, C]``, gives dtype and shape.
        order: int64[K] on the device, the active features first.
        count: int32[1] on the device, the number of active features. It is read on the device:
            under graph capture it may change between replays.
        n: the number to choose tiles and splits for; K where it is not known on the host.
        want_bias: whether the second gradient is computed.
        splits: parts of the reduction; None: as many as fill the device.
        tiles: None: by shape.
        operation: whose precision of float32 products applies.

    Returns:
        ``[K, C]`` and ``[K]``, of ``weight``'s dtype. The bits follow from the arguments alone.
    """
    t, c = input.shape
    k = len(order)
    if input.stride(1) != 1:
        input = input.contiguous()
    arch = architecture(input.device)
    how = precision(operation, input.dtype, arch)
    described = packed_wgrad.supports(grad_output, input)
    if tiles is None or (tiles.packed and not described):
        tiles = choices(n, c, input.dtype, how, arch, described=described)[0]
    splits = splits or splits_for(tiles, n, c, t, input.device)
    t_per_split = -(-t // splits)
    t_per_split = max(1, -(-t_per_split // tiles.block_t)) * tiles.block_t
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(k) if want_bias else None
    parts = bias_parts = None
    if splits > 1:
        parts = torch.empty((splits, k, c), dtype=torch.float32, device=weight.device)
        if want_bias and not tiles.packed:
            bias_parts = parts.new_empty((splits, k))
    if tiles.packed:
        packed_wgrad.product(
            grad_output, input, order, count, n, grad_weight, grad_bias, parts, t_per_split, tiles
        )
    else:
        out = grad_weight if parts is None else parts
        bias_out = grad_bias if parts is None else bias_parts
        wgrad_kernel[(-(-k // tiles.block_n) * -(-c // tiles.block_c), splits)](
            grad_output,
            input,
            order,
            count,
            out,
            out if bias_out is None else bias_out,
            t,
            k,
            c,
            grad_output.stride(0),
            grad_output.stride(1),
            input.stride(0),
            t_per_split,
            DIRECT=parts is None,
            WITH_BIAS=want_bias,
            PRECISION=how,
            WIDE=is_wide(grad_output),
            BLOCK_N=tiles.block_n,
            BLOCK_C=tiles.block_c,
            BLOCK_T=tiles.block_t,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    if parts is not None:
        add_parts(parts, bias_parts, order, count, grad_weight, grad_bias)
    return grad_weight, grad_bias


def add_parts(
    parts: Tensor,
    bias_parts: Tensor | None,
    order: Tensor,
    count: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
) -> None:
    """Add ``parts`` (``[splits, K, row]``) and ``bias_parts`` (``[splits, K]``, or None) into
    gradients whose rows lie one after the other in memory."""
    splits, k, c = parts.shape
    rows, columns = 16, min(128, triton.next_power_of_2(c))
    add_parts_kernel[(-(-k // rows), -(-c // columns))](
        parts,
        parts if bias_parts is None else bias_parts,
        order,
        count,
        grad_weight,
        grad_weight if grad_bias is None else grad_bias,
        k,
        c,
        splits,
        WITH_BIAS=bias_parts is not None,
        BLOCK_N=rows,
        BLOCK_C=columns,
    )
