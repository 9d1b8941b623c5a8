"""Weight and bias gradients of a linear layer's active features, for GPUs whose hardware copies
tiles (tensor descriptors): dY is packed first, so the main loop is that of a dense product.

The gathering kernel of ``linear_wgrad`` reads dY once, but element by element; this one writes and
reads the active part of it again, and leaves nothing but copies and products to the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from neq_kernels.backends.triton.pack import gather
from neq_kernels.backends.triton.tiles import DESCRIPTOR_ALIGNMENT, Tiles, can_describe


@triton.jit
def product_kernel(
    dy,
    x,
    order,
    count,
    sums,
    out,
    bias_out,
    t,
    k,
    c,
    t_per_split,
    DIRECT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of rows and columns, for one part of the reduction.

    ``dy`` and ``x`` are descriptors of ``[T, n]``, of which the first ``count`` columns hold
    something, and of ``[T, C]``; what lies outside of them reads as 0. ``DIRECT``: as for
    ``linear_wgrad.wgrad_kernel``. ``WITH_BIAS``: ``sums[:count]`` is put into ``bias_out``.
    """
    tiles_c = tl.cdiv(c, BLOCK_C)
    pn, pc = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    split = tl.program_id(1)
    n = tl.load(count)
    first = split * t_per_split
    last = tl.minimum(first + t_per_split, t)
    if pn * BLOCK_N >= n:
        last = first
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for at in range(first, last, BLOCK_T):
        a = dy.load([at, pn * BLOCK_N])
        b = x.load([at, pc * BLOCK_C])
        acc = tl.dot(tl.trans(a), b, acc)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = pc * BLOCK_C + tl.arange(0, BLOCK_C)
    is_active, is_neuron, is_column = rn < n, rn < k, rc < c
    neurons = tl.load(order + rn, mask=is_neuron, other=0)
    if DIRECT:
        # Columns that nobody wrote may hold anything.
        acc = tl.where(is_active[:, None], acc, 0.0)
        to = out + neurons[:, None] * c + rc[None, :]
        mask = is_neuron[:, None] & is_column[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
    else:
        to = out + split.to(tl.int64) * k * c + (rn.to(tl.int64) * c)[:, None] + rc[None, :]
        tl.store(to, acc, mask=is_active[:, None] & is_column[None, :])
    if WITH_BIAS and pc + split == 0:
        bias = tl.load(sums + rn, mask=is_active, other=0.0)
        tl.store(bias_out + neurons, bias.to(bias_out.dtype.element_ty), mask=is_neuron)


def supports(grad_output: Tensor, input: Tensor) -> bool:
    """Whether descriptors can say how these matrices lie in memory."""
    return (
        grad_output.stride(1) == input.stride(1) == 1
        and can_describe(input.stride(0), input.dtype)
        and input.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    )


def product(
    grad_output: Tensor,
    input: Tensor,
    order: Tensor,
    count: Tensor,
    n: int,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    parts: Tensor | None,
    t_per_split: int,
    tiles: Tiles,
) -> None:
    """The first pass of ``linear_wgrad``, of what it ``supports``.

    Args:
        grad_weight, grad_bias: written whole, but for a ``grad_weight`` that is given in parts.
        parts: float32 ``[splits, K, C]``, the first ``count`` rows are written; None: one part.
        The others are those of ``linear_wgrad``.
    """
    t, c = input.shape
    k = len(order)
    multiple = DESCRIPTOR_ALIGNMENT // input.element_size()
    columns = -(-max(1, n) // multiple) * multiple
    packed, sums = gather(grad_output, order, count, columns, summed=grad_bias is not None)
    grid = (-(-k // tiles.block_n) * -(-c // tiles.block_c), 1 if parts is None else len(parts))
    product_kernel[grid](
        TensorDescriptor.from_tensor(packed, [tiles.block_t, tiles.block_n]),
        TensorDescriptor.from_tensor(input, [tiles.block_t, tiles.block_c]),
        order,
        count,
        packed if sums is None else sums,
        grad_weight if parts is None else parts,
        grad_weight if grad_bias is None else grad_bias,
        t,
        k,
        c,
        t_per_split,
        DIRECT=parts is None,
        WITH_BIAS=grad_bias is not None,
        BLOCK_N=tiles.block_n,
        BLOCK_C=tiles.block_c,
        BLOCK_T=tiles.block_t,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
