"""Pack the active channels, call PyTorch's own library kernels on them, write the rows back.

Works on every device and needs no compiler. The primitives at the top have faster versions in
``backends.cpu``; the strategies below take whichever module serves (``primitives``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from neq_kernels.backends.geometry import ConvGeometry
from neq_kernels.channels import NeuronLayout

_ROWS = NeuronLayout()

# BLAS works on this many rows at a time. What is left over, on any of its threads, it sums one
# product after the other, with up to 30 times the error of the rest (float32, 100,000 products).
_ROWS_AT_A_TIME = 4


def unavailable() -> str | None:
    """PyTorch itself is always there."""
    return None


# --- primitives --------------------------------------------------------------------------------


def pack(t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
    """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format."""
    if dim == 1 and t.dim() in (4, 5) and not t.is_contiguous():
        channels_inside = t.movedim(1, -1)
        if channels_inside.is_contiguous():
            return channels_inside.index_select(-1, order[:n]).movedim(-1, 1)
    return t.index_select(dim, order[:n])


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


def rounded_up(n: int, k: int) -> int:
    """How many of ``order``'s channels to pack for n active of k; those behind n are dropped."""
    return min(k, -(-n // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME)


class Primitives(Protocol):
    """What a backend module offers to the strategies below."""

    def pack(self, t: Tensor, order: Tensor, n: int, dim: int) -> Tensor: ...

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor: ...


# --- linear ------------------------------------------------------------------------------------


def linear_dgrad(grad_output: Tensor, weight: Tensor, input_size: Sequence[int]) -> Tensor:
    dy = grad_output.reshape(-1, weight.shape[0])
    return dy.mm(weight).reshape(input_size)


def linear_active_dgrad(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    order: Tensor,
    n: int,
    primitives: Primitives,
) -> Tensor:
    dy = grad_output.reshape(-1, weight.shape[0])
    packed = primitives.pack(dy, order, n, 1)
    return packed.mm(primitives.pack(weight, order, n, 0)).reshape(input_size)


def linear_wgrad(
    grad_output: Tensor, input: Tensor, want: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Dense weight and bias gradients of ``grad_output``'s channels, as autograd computes them."""
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    grad_weight = dy.t().mm(input.reshape(len(dy), input.shape[-1])) if want[0] else None
    return grad_weight, dy.sum(0) if want[1] else None


# --- convolution -------------------------------------------------------------------------------


def conv_active_rows(
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
    packed = primitives.pack(grad_output, order, m, 1)
    axis = geometry.layout.axis
    assert axis is not None
    shape_only = weight.narrow(axis, 0, m)
    _, rows, bias = geometry.backward(packed, input, shape_only, (False, *want))
    if m == n:
        return rows, bias
    return (
        None if rows is None else rows.narrow(axis, 0, n),
        None if bias is None else bias.narrow(0, 0, n),
    )


def conv_active_rows_grouped(
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
