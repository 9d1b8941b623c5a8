"""Every strategy but custom kernels, in terms of PyTorch's own operators.

Works on every device and needs no compiler. Subclasses have faster ways of packing channels and of
scattering rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend, Grads, in_layout_of, shape_only
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import Active, NeuronLayout

ROWS = NeuronLayout()

# BLAS works on this many rows at a time. What is left over, on any of its threads, it sums one
# product after the other, with up to 30 times the error of the rest (float32, 100,000 products).
_ROWS_AT_A_TIME = 4

_INPUTS_OF_A_BLOCK = 8

# Of an output whose similarity is computed: so many stay in a core's cache, or keep a GPU busy.
_ELEMENTS_ON_CPU, _ELEMENTS_ON_GPU = 2**17, 2**24

# The gradients of weight and bias, and which of them are asked for.
_Wgrads = tuple[Tensor | None, Tensor | None]
_Asked = tuple[bool, bool]


class Aten(Backend):
    """PyTorch's operators on the active channels (``PACK``), or on all of them (``DENSE``)."""

    name = "aten"

    def unavailable(self) -> str | None:
        return None

    def supports(self, device_type: str) -> bool:
        return True

    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        g = problem.geometry
        # The rows of a grouped transposed weight are no plain block.
        packs = g is None or g.groups == 1 or not g.transposed
        packs = packs and not _overruns(problem)
        return (Strategy.DENSE, Strategy.PACK) if packs else (Strategy.DENSE,)

    # --- packing and scattering ------------------------------------------------------------------

    def pack(self, t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
        """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format."""
        if dim == 1 and t.dim() in (4, 5) and not t.is_contiguous():
            channels_inside = t.movedim(1, -1)
            if channels_inside.is_contiguous():
                return channels_inside.index_select(-1, order[:n]).movedim(-1, 1)
        return t.index_select(dim, order[:n])

    def pack_and_sum(
        self, t: Tensor, order: Tensor, n: int, dim: int
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`pack`, and each channel's sum where one pass makes both, else None."""
        return self.pack(t, order, n, dim), None

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor:
        """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0."""
        out = torch.empty_like(like)
        layout.scatter_(out, order[:n], layout.rows(rows).to(out.dtype))
        layout.fill_(out, order[n:], 0)
        return out

    def _packed(
        self, t: Tensor, order: Tensor, n: int, asked: _Asked
    ) -> tuple[Tensor, Tensor | None]:
        """Channels ``order[:n]`` of ``t`` along dimension 1; their sums too where they are asked
        for and come with it."""
        if asked[1]:
            return self.pack_and_sum(t, order, n, 1)
        return self.pack(t, order, n, 1), None

    def _scatter(
        self, rows: _Wgrads, weight: Tensor, k: int, active: Active, layout: NeuronLayout
    ) -> _Wgrads:
        weight_rows, bias_rows = rows
        order, n = active.order, active.n
        return (
            None
            if weight_rows is None
            else self.scatter_rows(weight_rows, weight, order, n, layout),
            None
            if bias_rows is None
            else self.scatter_rows(bias_rows, weight.new_empty(k), order, n, ROWS),
        )

    # --- linear ----------------------------------------------------------------------------------

    def linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        k = weight.shape[0]
        order, n = active.order, active.n
        grad_input = None
        if output_mask[0]:
            grad_input = grad_output.reshape(-1, k).mm(weight).reshape(input_size)
        asked = (output_mask[1], output_mask[2])
        if not any(asked) or n == 0:
            return grad_input, *_zeros(weight, k, asked)
        # Of the bias alone: the input was not saved and is not read.
        x = grad_output if input is None else input
        m = rounded_up(n, k)
        if choice.strategy == Strategy.DENSE or m == k:
            dense, bias = _linear_wgrad(grad_output, x, asked)
            grads = in_layout_of(weight, dense), bias
            return grad_input, *(grads if n == k else _overwrite_frozen(grads, ROWS, order[n:]))
        skipped, sums = 0, None
        if active.start >= 0:
            first = min(active.start, k - m)
            packed, skipped = grad_output.narrow(-1, first, m), active.start - first
        else:
            packed, sums = self._packed(grad_output.reshape(-1, k), order, m, asked)
        rows, bias = _linear_wgrad(packed, x, (asked[0], asked[1] and sums is None))
        weight_rows, bias_rows = (
            None if some is None else some.narrow(0, skipped, n)
            for some in (rows, bias if sums is None else sums)
        )
        return grad_input, *self._scatter((weight_rows, bias_rows), weight, k, active, ROWS)

    def linear_active_dgrad(
        self, grad_output: Tensor, weight: Tensor, input_size: Sequence[int], active: Active
    ) -> Tensor:
        dy = grad_output.reshape(-1, weight.shape[0])
        packed = self.pack(dy, active.order, active.n, 1)
        rows = self.pack(weight, active.order, active.n, 0)
        return packed.mm(rows).reshape(input_size)

    # --- convolution -----------------------------------------------------------------------------

    def conv_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        k = grad_output.shape[1]
        order, n = active.order, active.n
        x = shape_only(grad_output, input, input_size)
        asked = (output_mask[1], output_mask[2])
        # The bias alone is no reason to pack anything.
        dense = choice.strategy == Strategy.DENSE or not asked[0]
        if n == k or (dense and n > 0 and any(asked)):
            dx, dw, db = geometry.backward(grad_output, x, weight, output_mask)
            grads = in_layout_of(weight, dw), db
            return dx, *(grads if n == k else _overwrite_frozen(grads, geometry.layout, order[n:]))
        grad_input = None
        if output_mask[0]:
            grad_input = geometry.backward(grad_output, x, weight, (True, False, False))[0]
        if not any(asked) or n == 0:
            return grad_input, *_zeros(weight, k, asked)
        active_rows = self._active_rows if geometry.groups == 1 else self._active_rows_grouped
        rows = active_rows(grad_output, x, weight, geometry, active, asked)
        return grad_input, *self._scatter(rows, weight, k, active, geometry.layout)

    def conv_active_dgrad(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
    ) -> Tensor | None:
        masked = grad_output.index_fill(1, active.order[active.n :], 0)
        x = shape_only(grad_output, input, input_size)
        return geometry.backward(masked, x, weight, (True, False, False))[0]

    def _active_rows(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: ConvGeometry,
        active: Active,
        asked: _Asked,
    ) -> _Wgrads:
        """Weight rows and bias entries of the active channels alone, for ``groups == 1``."""
        n = active.n
        m = rounded_up(n, len(active.order))
        packed, sums = self._packed(grad_output, active.order, m, asked)
        axis = geometry.layout.axis
        assert axis is not None
        like = weight.narrow(axis, 0, m)
        mask = (False, asked[0], asked[1] and sums is None)
        _, rows, bias = geometry.backward(packed, input, like, mask)
        bias = bias if sums is None else sums
        if m == n:
            return rows, bias
        return (
            None if rows is None else rows.narrow(axis, 0, n),
            None if bias is None else bias.narrow(0, 0, n),
        )

    def _active_rows_grouped(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: ConvGeometry,
        active: Active,
        asked: _Asked,
    ) -> _Wgrads:
        """The same for ``groups > 1``: groups without an active channel are left out, the others
        padded to the widest one with a repeated channel of their own, whose result is dropped."""
        per_group, in_per_group = weight.shape[0] // geometry.groups, weight.shape[1]
        channels, device = active.order[: active.n], active.order.device
        live, counts = torch.unique_consecutive(
            channels.div(per_group, rounding_mode="floor"), return_counts=True
        )
        width = rounded_up(int(counts.max()), per_group)
        slot = torch.arange(width, device=device)
        used = slot < counts[:, None]
        first = counts.cumsum(0) - counts
        chosen = channels[(first[:, None] + slot).where(used, first[:, None])].flatten()
        inputs = live[:, None] * in_per_group + torch.arange(in_per_group, device=device)
        grads = geometry.backward(
            self.pack(grad_output, chosen, len(chosen), 1),
            self.pack(input, inputs.flatten(), inputs.numel(), 1),
            weight.narrow(0, 0, len(chosen)),
            (False, *asked),
            groups=len(live),
        )
        if len(chosen) == active.n:
            return grads[1:]
        kept = used.flatten().nonzero().flatten()
        rows, bias = (None if g is None else g.index_select(0, kept) for g in grads[1:])
        return rows, bias

    # --- similarity ------------------------------------------------------------------------------

    def channel_similarity(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        dims = [d for d in range(a.dim()) if d != dim % a.dim()]
        a, b = a.detach(), b.detach()
        if not dims:
            a, b = a.double(), b.double()
            return torch.stack([a * b, a * a, b * b])
        # A part at a time: in float64 three times the whole would be held otherwise.
        at_once = _ELEMENTS_ON_CPU if a.is_cpu else _ELEMENTS_ON_GPU
        size = max(1, at_once * a.shape[dims[0]] // max(1, a.numel()))
        sums = torch.zeros((3, a.shape[dim]), dtype=torch.float64, device=a.device)
        for part, other in zip(a.split(size, dims[0]), b.split(size, dims[0]), strict=True):
            x, y = part.double(), other.double()
            sums += torch.stack([(x * y).sum(dims), (x * x).sum(dims), (y * y).sum(dims)])
        return sums


def count_write(*tensors: Sequence[Tensor]) -> None:
    """A kernel writes behind autograd's back; it must see that saved tensors went stale."""
    torch.autograd.graph.increment_version(list(itertools.chain(*tensors)))


def rounded_up(n: int, k: int) -> int:
    """How many of ``order``'s channels to pack for n active of k; those behind n are dropped."""
    return min(k, -(-n // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME)


def _overruns(problem: Problem) -> bool:
    """Whether packing could make a convolution for which oneDNN's ``jit_1x1:avx2`` writes past its
    buffer and corrupts the heap (seen in PyTorch 2.14): strided, pointwise, not grouped, channels
    last, fewer input channels than a block of its, one thread. Packing leaves out groups; where the
    convolution is transposed dY takes the place of the input."""
    g = problem.geometry
    if g is None or math.prod(problem.weight_size[2:]) > 1 or max(g.stride) == 1:
        return False
    return g.transposed or problem.weight_size[1] < _INPUTS_OF_A_BLOCK


def _linear_wgrad(grad_output: Tensor, input: Tensor, asked: _Asked) -> _Wgrads:
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    grad_weight = dy.t().mm(input.reshape(len(dy), input.shape[-1])) if asked[0] else None
    return grad_weight, dy.sum(0) if asked[1] else None


def _zeros(weight: Tensor, k: int, asked: _Asked) -> _Wgrads:
    return (
        torch.zeros_like(weight) if asked[0] else None,
        weight.new_zeros(k) if asked[1] else None,
    )


def _overwrite_frozen(grads: _Wgrads, layout: NeuronLayout, frozen: Tensor) -> _Wgrads:
    grad_weight, grad_bias = grads
    if grad_weight is not None:
        layout.fill_(grad_weight, frozen, 0)
    if grad_bias is not None:
        ROWS.fill_(grad_bias, frozen, 0)
    return grad_weight, grad_bias
