"""What the vendor's library needs of a mask: the active channels of dY gathered, and its rows put
back into a whole gradient. Each is one launch.

The number of active channels comes from the host: it gives the size of what is allocated.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_N = 64, 64
_BLOCK_ROWS, _MOST_COLUMNS = 8, 256


@triton.jit(do_not_specialize=["n"])
def gather_kernel(
    source,
    order,
    packed,
    t,
    n,
    stride_t,
    packed_t,
    packed_n,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of ``packed[t, i] = source[t, order[i]]``, i < n. Where the target is transposed a
    tile turns over in shared memory, so reads and writes are coalesced."""
    pt, pn = tl.program_id(0).to(tl.int64), tl.program_id(1)
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


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(
    rows,
    order,
    out,
    k,
    n,
    size,
    rows_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of ``out[order[i]] = rows[i] if i < n else 0``, i < k."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column = rc < size
    given = (rn < n)[:, None] & is_column[None, :]
    source = tl.where(rn < n, rn, 0).to(tl.int64)
    tile = tl.load(rows + source[:, None] * rows_stride + rc[None, :], mask=given, other=0.0)
    neurons = tl.load(order + rn, mask=rn < k, other=0)
    to = out + neurons[:, None] * size + rc[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=(rn < k)[:, None] & is_column[None, :])


def gather(source: Tensor, order: Tensor, n: int, *, transposed: bool) -> Tensor:
    """``source[:, order[:n]]``.

    Args:
        source: ``[T, K]`` with columns innermost.
        order: int64 on the device, its first n entries in [0, K).
        n: at least 1.
        transposed: whether the result's rows lie innermost in memory.

    Returns:
        ``[T, n]``.
    """
    t = source.shape[0]
    packed = source.new_empty((n, t)).t() if transposed else source.new_empty((t, n))
    gather_kernel[(-(-t // BLOCK_T), -(-n // BLOCK_N))](
        source,
        order,
        packed,
        t,
        n,
        source.stride(0),
        *packed.stride(),
        BLOCK_T=BLOCK_T,
        BLOCK_N=BLOCK_N,
    )
    return packed


def scatter(rows: Tensor, out: Tensor, order: Tensor, n: int) -> None:
    """``out[order[:n]] = rows`` and 0 everywhere else.

    Args:
        rows: ``[n, ...]``; each row as dense in memory, and in the same order, as those of ``out``.
        out: ``[K, ...]`` whose rows lie one after the other in memory; any floating dtype.
        order: int64[K] on the device, every neuron once.
    """
    k = out.shape[0]
    size = out.numel() // k
    columns = min(_MOST_COLUMNS, triton.next_power_of_2(size))
    scatter_kernel[(-(-k // _BLOCK_ROWS), -(-size // columns))](
        rows,
        order,
        out,
        k,
        n,
        size,
        rows.stride(0),
        BLOCK_N=_BLOCK_ROWS,
        BLOCK_C=columns,
    )
