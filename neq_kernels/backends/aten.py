"""The strategies in terms of PyTorch's own operators.

Works on every device and needs no compiler. The primitives at the top have faster versions in
``backends.cpu``; what is below takes whichever module serves (``primitives``).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.channels import NeuronLayout

_ROWS = NeuronLayout()

# BLAS works on this many rows at a time. What is left over, on any of its threads, it sums one
# product after the other, with up to 30 times the error of the rest (float32, 100,000 products).
_ROWS_AT_A_TIME = 4

_INPUTS_OF_A_BLOCK = 8

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def unavailable() -> str | None:
    """PyTorch itself is always there."""
    return None


def strategies(problem: Problem) -> tuple[Strategy, ...]:
    """The strategies that can serve."""
    g = problem.geometry
    # The rows of a grouped transposed weight are no plain block.
    packs = g is None or g.groups == 1 or not g.transposed
    packs = packs and not _overruns(problem)
    return (Strategy.DENSE, Strategy.PACK) if packs else (Strategy.DENSE,)


def _overruns(problem: Problem) -> bool:
    """Whether packing could make a convolution for which oneDNN's ``jit_1x1:avx2`` writes past its
    buffer and corrupts the heap (seen in PyTorch 2.14): strided, pointwise, not grouped, channels
    last, fewer input channels than a block of its, one thread. Packing leaves out groups; where the
    convolution is transposed dY takes the place of the input."""
    g = problem.geometry
    if g is None or math.prod(problem.weight_size[2:]) > 1 or max(g.stride) == 1:
        return False
    return g.transposed or problem.weight_size[1] < _INPUTS_OF_A_BLOCK


# --- primitives --------------------------------------------------------------------------------


def pack(t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
    """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format."""
    if dim == 1 and t.dim() in (4, 5) and not t.is_contiguous():
        channels_inside = t.movedim(1, -1)
        if channels_inside.is_contiguous():
            return channels_inside.index_select(-1, order[:n]).movedim(-1, 1)
    return t.index_select(dim, order[:n])


def pack_and_sum(t: Tensor, order: Tensor, n: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """``pack``, and each channel's sum where one pass makes both, else None."""
    return pack(t, order, n, dim), None


def scatter_rows(rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout) -> Tensor:
    """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0."""
    out = torch.empty_like(like)
    layout.scatter_(out, order[:n], layout.rows(rows).to(out.dtype))
    layout.fill_(out, order[n:], 0)
    return out


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """float64 ``[3, K]``: sums of ``a*b``, ``a*a``, ``b*b`` over every dimension but ``dim``."""
    dims = [d for d in range(a.dim()) if d != dim % a.dim()]
    a, b = a.detach().double(), b.detach().double()
    if not dims:
        return torch.stack([a * b, a * a, b * b])
    return torch.stack([(a * b).sum(dims), (a * a).sum(dims), (b * b).sum(dims)])


def count_write(*tensors: Sequence[Tensor]) -> None:
    """A kernel writes behind autograd's back; it must see that saved tensors went stale."""
    torch.autograd.graph.increment_version(list(itertools.chain(*tensors)))


def rounded_up(n: int, k: int) -> int:
    """How many of ``order``'s channels to pack for n active of k; those behind n are dropped."""
    return min(k, -(-n // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME)


class Primitives(Protocol):
    """What a backend module offers to the strategies below."""

    def pack(self, t: Tensor, order: Tensor, n: int, dim: int) -> Tensor: ...

    def pack_and_sum(
        self, t: Tensor, order: Tensor, n: int, dim: int
    ) -> tuple[Tensor, Tensor | None]: ...

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor: ...


_OWN = cast(Primitives, sys.modules[__name__])


# --- linear ------------------------------------------------------------------------------------


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    n: int,
    start: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    primitives: Primitives | None = None,
) -> Grads:
    """Gradients of a linear layer; the input's is the exact one."""
    primitives = primitives or _OWN
    k = weight.shape[0]
    grad_input = None
    if wanted[0]:
        grad_input = grad_output.reshape(-1, k).mm(weight).reshape(input_size)
    want = (wanted[1], wanted[2])
    if not any(want) or n == 0:
        return grad_input, *_zeros(weight, k, want)
    # Bias alone was wanted: the input was not saved and is not read.
    x = grad_output if input is None else input
    m = rounded_up(n, k)
    if strategy == Strategy.DENSE or m == k:
        dense = _linear_wgrad(grad_output, x, want)
        return grad_input, *(dense if n == k else _overwrite_frozen(dense, _ROWS, order[n:]))
    skipped, sums = 0, None
    if start >= 0:
        first = min(start, k - m)
        packed, skipped = grad_output.narrow(-1, first, m), start - first
    else:
        packed, sums = _packed(primitives, grad_output.reshape(-1, k), order, m, want)
    rows, bias = _linear_wgrad(packed, x, (want[0], want[1] and sums is None))
    weight_rows, bias_rows = (
        None if some is None else some.narrow(0, skipped, n)
        for some in (rows, bias if sums is None else sums)
    )
    return grad_input, *_scatter((weight_rows, bias_rows), weight, k, order, n, _ROWS, primitives)


def linear_active_dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    order: Tensor,
    n: int,
    primitives: Primitives,
) -> Tensor:
    """The input gradient that the active features alone propagate."""
    dy = grad_output.reshape(-1, weight.shape[0])
    packed = primitives.pack(dy, order, n, 1)
    return packed.mm(primitives.pack(weight, order, n, 0)).reshape(input_size)


def _packed(
    primitives: Primitives, t: Tensor, order: Tensor, n: int, want: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None]:
    """Channels ``order[:n]`` of ``t`` along dimension 1; their sums too where they are wanted and
    come with it."""
    if want[1]:
        return primitives.pack_and_sum(t, order, n, 1)
    return primitives.pack(t, order, n, 1), None


def _linear_wgrad(
    grad_output: Tensor, input: Tensor, want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    grad_weight = dy.t().mm(input.reshape(len(dy), input.shape[-1])) if want[0] else None
    return grad_weight, dy.sum(0) if want[1] else None


# --- convolution -------------------------------------------------------------------------------


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    primitives: Primitives | None = None,
) -> Grads:
    """Gradients of a convolution; the input's is the exact one."""
    primitives = primitives or _OWN
    k = grad_output.shape[1]
    want = (wanted[1], wanted[2])
    if n == k:
        return geometry.backward(grad_output, input, weight, wanted)
    if strategy == Strategy.DENSE and n > 0 and any(want):
        grad_input, *dense = geometry.backward(grad_output, input, weight, wanted)
        return grad_input, *_overwrite_frozen((dense[0], dense[1]), geometry.layout, order[n:])
    grad_input = None
    if wanted[0]:
        grad_input = geometry.backward(grad_output, input, weight, (True, False, False))[0]
    if not any(want) or n == 0:
        return grad_input, *_zeros(weight, k, want)
    active_rows = _active_rows if geometry.groups == 1 else _active_rows_grouped
    rows = active_rows(grad_output, input, weight, geometry, order, n, want, primitives)
    return grad_input, *_scatter(rows, weight, k, order, n, geometry.layout, primitives)


def conv_active_dgrad(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
) -> Tensor | None:
    """The input gradient that the active channels alone propagate."""
    masked = grad_output.index_fill(1, order[n:], 0)
    return geometry.backward(masked, input, weight, (True, False, False))[0]


def _active_rows(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    want: tuple[bool, bool],
    primitives: Primitives,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight rows and bias entries of the active channels alone, for ``groups == 1``."""
    m = rounded_up(n, len(order))
    packed, sums = _packed(primitives, grad_output, order, m, want)
    axis = geometry.layout.axis
    assert axis is not None
    shape_only = weight.narrow(axis, 0, m)
    wanted = (False, want[0], want[1] and sums is None)
    _, rows, bias = geometry.backward(packed, input, shape_only, wanted)
    bias = bias if sums is None else sums
    if m == n:
        return rows, bias
    return (
        None if rows is None else rows.narrow(axis, 0, n),
        None if bias is None else bias.narrow(0, 0, n),
    )


def _active_rows_grouped(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    want: tuple[bool, bool],
    primitives: Primitives,
) -> tuple[Tensor | None, Tensor | None]:
    """The same for ``groups > 1``: groups without an active channel are left out, the others padded
    to the widest one with a repeated channel of their own, whose result is dropped."""
    per_group, in_per_group = weight.shape[0] // geometry.groups, weight.shape[1]
    active = order[:n]
    live, counts = torch.unique_consecutive(
        active.div(per_group, rounding_mode="floor"), return_counts=True
    )
    width = rounded_up(int(counts.max()), per_group)
    slot = torch.arange(width, device=order.device)
    used = slot < counts[:, None]
    first = counts.cumsum(0) - counts
    chosen = active[(first[:, None] + slot).where(used, first[:, None])].flatten()
    inputs = live[:, None] * in_per_group + torch.arange(in_per_group, device=order.device)
    grads = geometry.backward(
        primitives.pack(grad_output, chosen, len(chosen), 1),
        primitives.pack(input, inputs.flatten(), inputs.numel(), 1),
        weight.narrow(0, 0, len(chosen)),
        (False, *want),
        groups=len(live),
    )
    if len(chosen) == n:
        return grads[1:]
    kept = used.flatten().nonzero().flatten()
    rows, bias = (None if g is None else g.index_select(0, kept) for g in grads[1:])
    return rows, bias


# --- whole gradients ---------------------------------------------------------------------------


def _scatter(
    rows: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    k: int,
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    primitives: Primitives,
) -> tuple[Tensor | None, Tensor | None]:
    weight_rows, bias_rows = rows
    return (
        None
        if weight_rows is None
        else primitives.scatter_rows(weight_rows, weight, order, n, layout),
        None
        if bias_rows is None
        else primitives.scatter_rows(bias_rows, weight.new_empty(k), order, n, _ROWS),
    )


def _zeros(weight: Tensor, k: int, want: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.zeros_like(weight) if want[0] else None,
        weight.new_zeros(k) if want[1] else None,
    )


def _overwrite_frozen(
    grads: tuple[Tensor | None, Tensor | None], layout: NeuronLayout, frozen: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    grad_weight, grad_bias = grads
    if grad_weight is not None:
        layout.fill_(grad_weight, frozen, 0)
    if grad_bias is not None:
        _ROWS.fill_(grad_bias, frozen, 0)
    return grad_weight, grad_bias
