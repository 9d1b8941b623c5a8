"""Sums of products of two outputs, channel by channel: what a cosine similarity is made of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends.triton.tiles import is_wide, processors

BLOCK_K, BLOCK_T = 32, 64
_PROGRAMS_EACH = 4


@triton.jit
def similarity_kernel(
    a,
    b,
    out,
    t,
    k,
    inner,
    a_outer,
    a_k,
    a_inner,
    b_outer,
    b_k,
    b_inner,
    t_per_split,
    CHANNELS_INSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out``: float32 ``[splits, 3, k]``, the sums of a*b, a*a and b*b."""
    rk = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    rt = tl.arange(0, BLOCK_T)
    along: tl.constexpr = 0 if CHANNELS_INSIDE else 1
    across: tl.constexpr = 1 - along
    is_channel = rk < k
    channels = tl.where(is_channel, rk, 0)
    channels = tl.expand_dims(channels.to(tl.int64) if WIDE else channels, along)
    live = tl.expand_dims(is_channel, along)
    first = split * t_per_split
    last = tl.minimum(first + t_per_split, t)
    ab = tl.zeros((BLOCK_K,), tl.float32)
    aa = tl.zeros((BLOCK_K,), tl.float32)
    bb = tl.zeros((BLOCK_K,), tl.float32)
    for at in range(first, last, BLOCK_T):
        is_position = at + rt < last
        position = tl.expand_dims(tl.where(is_position, at + rt, first), across)
        mask = live & tl.expand_dims(is_position, across)
        outer, inside = position // inner, position % inner
        if not WIDE:
            outer, inside = outer.to(tl.int32), inside.to(tl.int32)
        at_a = outer * a_outer + inside * a_inner + channels * a_k
        at_b = outer * b_outer + inside * b_inner + channels * b_k
        u = tl.load(a + at_a, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(b + at_b, mask=mask, other=0.0).to(tl.float32)
        ab += tl.sum(u * v, axis=along)
        aa += tl.sum(u * u, axis=along)
        bb += tl.sum(v * v, axis=along)
    to = out + split * 3 * k + rk
    tl.store(to, ab, mask=is_channel)
    tl.store(to + k, aa, mask=is_channel)
    tl.store(to + 2 * k, bb, mask=is_channel)


def channel_similarity(a: Tensor, b: Tensor, dim: int, *, splits: int | None = None) -> Tensor:
    """float64 ``[3, K]``: sums of ``a*b``, ``a*a``, ``b*b`` over every dimension but ``dim``.

    Products are added in float32 over a part of the positions, the parts in float64, in order.
    """
    dim %= a.dim()
    k = a.shape[dim]
    a, b = _three_dimensional(a, dim), _three_dimensional(b, dim)
    t, inner = a.shape[0] * a.shape[2], a.shape[2]
    if splits is None:
        programs = _PROGRAMS_EACH * processors(a.device) // -(-k // BLOCK_K)
        splits = max(1, min(programs, -(-t // (4 * BLOCK_T))))
    t_per_split = max(1, -(-t // (splits * BLOCK_T))) * BLOCK_T
    out = torch.empty((splits, 3, k), dtype=torch.float32, device=a.device)
    similarity_kernel[(-(-k // BLOCK_K), splits)](
        a,
        b,
        out,
        t,
        k,
        max(1, inner),
        *a.stride(),
        *b.stride(),
        t_per_split,
        CHANNELS_INSIDE=a.stride(1) == 1,
        WIDE=is_wide(a, b),
        BLOCK_K=BLOCK_K,
        BLOCK_T=BLOCK_T,
    )
    return out.double().sum(0)


def _three_dimensional(output: Tensor, dim: int) -> Tensor:
    """``[outer, K, inner]``, a view wherever the strides allow it."""
    output = output.detach()
    output = output.flatten(dim + 1) if dim + 1 < output.dim() else output.unsqueeze(-1)
    return output.flatten(0, dim - 1) if dim > 0 else output.unsqueeze(0)
