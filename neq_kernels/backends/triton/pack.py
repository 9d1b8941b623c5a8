"""What a plain product needs of a mask: the active channels of dY gathered, and its rows put back
into a whole gradient.

The number of active channels is read on the device; the host's gives the size of what is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_N = 64, 64
_BLOCK_ROWS, _MOST_COLUMNS = 8, 256


@triton.jit(do_not_specialize=["m"])
def gather_kernel(
    source,
    order,
    count,
    packed,
    sums,
    t,
    m,
    stride_t,
    packed_t,
    packed_n,
    SUMMED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of ``packed[t, i] = source[t, order[i]]``, i < count. Where the target is transposed
    a tile turns over in shared memory, so reads and writes are coalesced.

    ``SUMMED``: ``sums[tile, i]`` is the tile's sum, in float32, of ``[tiles, m]``.
    """
    pt, pn = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(count)
    if pn * BLOCK_N >= n:
        return
    rt = pt * BLOCK_T + tl.arange(0, BLOCK_T)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rt < t, rn < n
    mask = is_row[:, None] & is_column[None, :]
    channels = tl.load(order + rn, mask=is_column, other=0)
    # Masked lanes too get an address that exists: an asynchronous copy may touch it.
    rows = tl.where(is_row, rt, 0)
    tile = tl.load(source + rows[:, None] * stride_t + channels[None, :], mask=mask, other=0.0)
    to = packed + rows[:, None] * packed_t + rn.to(tl.int64)[None, :] * packed_n
    tl.store(to, tile, mask=mask)
    if SUMMED:
        tl.store(sums + pt * m + rn, tl.sum(tile.to(tl.float32), axis=0), mask=is_column)


@triton.jit
def scatter_kernel(
    rows,
    order,
    count,
    out,
    k,
    size,
    rows_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of ``out[order[i]] = rows[i] if i < count else 0``, i < k."""
    n = tl.load(count)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = rc < size
    given = (rn < n)[:, None] & is_column[None, :]
    source = tl.where(rn < n, rn, 0).to(tl.int64)
    tile = tl.load(rows + source[:, None] * rows_stride + rc[None, :], mask=given, other=0.0)
    neurons = tl.load(order + rn, mask=rn < k, other=0)
    to = out + neurons[:, None] * size + rc[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=(rn < k)[:, None] & is_column[None, :])


def gather(
    source: Tensor,
    order: Tensor,
    count: Tensor,
    n: int,
    *,
    transposed: bool = False,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``source[:, order[:n]]``, and its sums over the rows.

    Args:
        source: ``[T, K]`` with columns innermost.
        order: int64 on the device, its first n entries in [0, K).
        count: int32[1] on the device: only so many columns are written.
        n: columns to allocate, at least 1 and at least as many as ``count`` says.
        transposed: whether the result's rows lie innermost in memory.
        summed: whether to return sums; they are added in a fixed order.

    Returns:
        ``[T, n]``, and float32 ``[n]`` or None.
    """
    t = source.shape[0]
    tiles = -(-t // BLOCK_T)
    packed = source.new_empty((n, t)).t() if transposed else source.new_empty((t, n))
    sums = source.new_empty((tiles, n), dtype=torch.float32) if summed else None
    gather_kernel[(tiles, -(-n // BLOCK_N))](
        source,
        order,
        count,
        packed,
        packed if sums is None else sums,
        t,
        n,
        source.stride(0),
        *packed.stride(),
        SUMMED=summed,
        BLOCK_T=BLOCK_T,
        BLOCK_N=BLOCK_N,
    )
    return packed, None if sums is None else sums.sum(0)


def scatter(rows: Tensor, out: Tensor, order: Tensor, count: Tensor) -> None:
    """``out[order[:count]] = rows[:count]`` and 0 everywhere else.

    Args:
        rows: ``[n, ...]``; each row as dense in memory, and in the same order, as those of ``out``.
        out: ``[K, ...]`` whose rows lie one after the other in memory; any floating dtype.
        order: int64[K] on the device, every neuron once.
        count: int32[1] on the device, at most n.
    """
    k = out.shape[0]
    size = out.numel() // k
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(size))
    scatter_kernel[(-(-k // _BLOCK_ROWS), -(-size // columns))](
        rows,
        order,
        count,
        out,
        k,
        size,
        rows.stride(0),
        BLOCK_N=_BLOCK_ROWS,
        BLOCK_C=columns,
    )
