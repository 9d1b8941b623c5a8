"""What a user would write instead: weight gradients of the active channels with PyTorch's own ops.

Every :class:`Provider` computes the weight and bias gradient of one layer from what autograd hands
to its backward. For whole models: :mod:`benchmarks.steps.peers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry

# F.grouped_mm wants every stride to be a multiple of 16 bytes: 8 channels of the smallest dtype.
_ALIGNMENT = 16
_ROW_MULTIPLE = 8

Grads = tuple[Tensor, Tensor | None]
# (geometry or None for a linear layer, grad_output, input, weight, active, whether it has a bias)
Wgrad = Callable[[ConvGeometry | None, Tensor, Tensor, Tensor, Tensor, bool], Grads]
WhyNot = Callable[[ConvGeometry | None, Tensor], str | None]


def _always(geometry: ConvGeometry | None, weight: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute ``(grad_weight, grad_bias or None)``.

    Attributes:
        wgrad: ``wgrad(geometry, grad_output, input, weight, active, bias)``. ``geometry`` is None
            for a linear layer; ``active`` holds int64 indices, ascending, on the weight's device.
        why_not: ``why_not(geometry, weight)``, the reason why it does not support a layer, or None.
        rows: what it returns: ``"masked"``, all rows with exact zeros in the frozen ones;
            ``"all"``, the dense gradient of every row; ``"active"``, the active rows alone.
        contiguous: it is for active channels that form one run; time it on ``arange(K')``.
    """

    name: str
    wgrad: Wgrad
    why_not: WhyNot = _always
    rows: Literal["masked", "all", "active"] = "masked"
    contiguous: bool = False


def dense(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """PyTorch's own path: every row."""
    if geometry is None:
        return _linear(grad_output.reshape(-1, weight.shape[0]), input, bias)
    return _conv(geometry, grad_output, input, weight, bias)


def mask(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 0: the dense gradient, its frozen rows overwritten."""
    grad_weight, grad_bias = dense(geometry, grad_output, input, weight, active, bias)
    frozen = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    frozen.index_fill_(0, active, False)
    frozen_rows = frozen.nonzero().flatten()
    grad_weight.index_fill_(0, frozen_rows, 0)
    if grad_bias is not None:
        grad_bias.index_fill_(0, frozen_rows, 0)
    return grad_weight, grad_bias


def index_select(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 1: gather the active channels, call PyTorch's kernel on them, put the rows back."""
    n = len(active)
    if n == 0:
        return _scattered(None, None, weight, active, bias)
    if geometry is None:
        dy = grad_output.reshape(-1, weight.shape[0]).index_select(1, active)
        rows = _linear(dy, input, bias)
    elif geometry.groups == 1:
        dy = grad_output.index_select(1, active)
        rows = _conv(geometry, dy, input, weight[:n], bias)
    elif _one_channel_per_group(geometry, weight):
        dy, x = grad_output.index_select(1, active), input.index_select(1, active)
        rows = _conv(geometry, dy, x, weight[:n], bias, groups=n)
    else:
        return mask(geometry, grad_output, input, weight, active, bias)
    return _scattered(*rows, weight, active, bias)


def permuted(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 2: the active channels lie side by side, so a view takes the place of the gather."""
    n = len(active)
    if n == 0:
        return _scattered(None, None, weight, active, bias)
    first = int(active[0])
    if geometry is None:
        dy = grad_output.reshape(-1, weight.shape[0]).narrow(1, first, n)
        rows = _linear(dy, input, bias)
    elif geometry.groups == 1:
        dy = grad_output.narrow(1, first, n)
        rows = _conv(geometry, dy, input, weight[:n], bias)
    elif _one_channel_per_group(geometry, weight):
        dy, x = grad_output.narrow(1, first, n), input.narrow(1, first, n)
        rows = _conv(geometry, dy, x, weight[:n], bias, groups=n)
    else:
        return mask(geometry, grad_output, input, weight, active, bias)
    grad_weight, grad_bias = _zeros(weight, bias)
    grad_weight.narrow(0, first, n).copy_(rows[0])
    if grad_bias is not None and rows[1] is not None:
        grad_bias.narrow(0, first, n).copy_(rows[1])
    return grad_weight, grad_bias


def requires_grad(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 3: a layer is frozen as a whole (no work) or not at all (dense)."""
    if len(active) == 0:
        return weight.new_empty(0), None
    return dense(geometry, grad_output, input, weight, active, bias)


def cat(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 4: the weight is a ``cat`` of a learning and a frozen parameter; the gradient of the
    whole is computed all the same. Its forward joins the two in every step."""
    n = len(active)
    whole = torch.cat([weight[:n], weight[n:]])
    grad_weight, grad_bias = dense(geometry, grad_output, input, whole, active, bias)
    return grad_weight[:n], None if grad_bias is None else grad_bias[:n]


def compiled(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 5: peer 1 under ``torch.compile``, once per shape and number of active channels."""
    result: Grads = _compiled()(geometry, grad_output, input, weight, active, bias)
    return result


def grouped_mm(
    geometry: ConvGeometry | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
    bias: bool,
) -> Grads:
    """Peer 6: one group of ``F.grouped_mm`` whose number of rows is read on the device."""
    if len(active) == 0:
        return _scattered(None, None, weight, active, bias)
    n = len(active)
    padding = active[-1:].expand(-n % _ROW_MULTIPLE)
    chosen = torch.cat([active, padding]) if len(padding) else active
    dy = grad_output.reshape(-1, weight.shape[0]).index_select(1, chosen)
    x = input.reshape(1, len(dy), input.shape[-1])
    count = torch.full((1,), n, dtype=torch.int32, device=weight.device)
    rows = F.grouped_mm(dy.t(), x, offs=count)[:n]
    return _scattered(rows, dy[:, :n].sum(0) if bias else None, weight, active, bias)


def why_not_compacted(geometry: ConvGeometry | None, weight: Tensor) -> str | None:
    """Why this layer cannot be computed from gathered channels, or None."""
    if geometry is None:
        return None
    if geometry.transposed:
        return "transposed convolution: rows of its weight are not output channels"
    if geometry.groups > 1 and not _one_channel_per_group(geometry, weight):
        return "several channels per group: no compacted convolution has ragged groups"
    return None


def why_not_grouped_mm(geometry: ConvGeometry | None, weight: Tensor) -> str | None:
    """Why ``F.grouped_mm`` cannot compute this layer, or None."""
    if geometry is not None:
        return "F.grouped_mm is for matrices: linear layers only"
    if weight.shape[1] * weight.element_size() % _ALIGNMENT:
        return f"F.grouped_mm wants rows of a multiple of {_ALIGNMENT} bytes"
    return _grouped_mm_error(weight.device.type, weight.dtype)


def _why_not_transposed(geometry: ConvGeometry | None, weight: Tensor) -> str | None:
    return why_not_compacted(geometry, weight) if geometry and geometry.transposed else None


DENSE = Provider("dense", dense, rows="all")
PEERS = (
    Provider("mask", mask, _why_not_transposed),
    Provider("index_select", index_select, why_not_compacted),
    Provider("permuted", permuted, why_not_compacted, contiguous=True),
    Provider("requires_grad", requires_grad, rows="all"),
    Provider("cat", cat, _why_not_transposed, rows="active", contiguous=True),
    Provider("compiled", compiled, why_not_compacted),
    Provider("grouped_mm", grouped_mm, why_not_grouped_mm),
)
PROVIDERS = {provider.name: provider for provider in (DENSE, *PEERS)}


def _linear(dy: Tensor, input: Tensor, bias: bool) -> Grads:
    grad_weight = dy.t().mm(input.reshape(len(dy), input.shape[-1]))
    return grad_weight, dy.sum(0) if bias else None


def _conv(
    geometry: ConvGeometry,
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: bool,
    groups: int | None = None,
) -> Grads:
    _, grad_weight, grad_bias = geometry.backward(dy, input, weight, (False, True, bias), groups)
    assert grad_weight is not None
    return grad_weight, grad_bias


def _one_channel_per_group(geometry: ConvGeometry, weight: Tensor) -> bool:
    return geometry.groups == len(weight) and weight.shape[1] == 1


def _zeros(weight: Tensor, bias: bool) -> Grads:
    return torch.zeros_like(weight), weight.new_zeros(len(weight)) if bias else None


def _scattered(
    rows: Tensor | None, bias_rows: Tensor | None, weight: Tensor, active: Tensor, bias: bool
) -> Grads:
    grad_weight, grad_bias = _zeros(weight, bias)
    if rows is not None:
        grad_weight.index_copy_(0, active, rows)
    if grad_bias is not None and bias_rows is not None:
        grad_bias.index_copy_(0, active, bias_rows)
    return grad_weight, grad_bias


@functools.cache
def _compiled() -> Wgrad:
    # The default of 8 would make it fall back to eager, silently, from the ninth shape on.
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    function: Wgrad = torch.compile(index_select, dynamic=False)
    return function


@functools.cache
def _grouped_mm_error(device_type: str, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no F.grouped_mm"
    a = torch.ones(16, 16, dtype=dtype, device=device_type)
    try:
        F.grouped_mm(a, a[None], offs=torch.full((1,), 16, dtype=torch.int32, device=device_type))
    except RuntimeError as error:
        return f"F.grouped_mm: {str(error).splitlines()[0]}"
    return None
