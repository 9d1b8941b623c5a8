"""The public operators ``torch.ops.neq_kernels.*``: schemas, fakes and FLOP formulas.

``order``, ``count`` and ``host_count`` are the tensors of an
:class:`~neq_kernels.channels.ActiveChannels`. Outputs that ``output_mask`` does not ask for are
empty tensors; gradients carry the weight's dtype and strides; frozen neurons get exact zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from neq_kernels.backends.base import Grads
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import Active
from neq_kernels.dispatch import backward

_LIBRARY = torch.library.Library("neq_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_Triple = tuple[Tensor, Tensor, Tensor]
# Of an ``ActiveChannels``: (order, count, host_count).
ActiveTensors = tuple[Tensor, Tensor, Tensor]

_LIBRARY.define(
    "linear_backward(Tensor grad_output, Tensor? input, SymInt[] input_size, Tensor weight, "
    "Tensor order, Tensor count, Tensor host_count, bool[3] output_mask, bool active_dgrad) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "conv_backward(Tensor grad_output, Tensor? input, SymInt[] input_size, Tensor weight, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
    "SymInt[] output_padding, SymInt groups, Tensor order, Tensor count, Tensor host_count, "
    "bool[3] output_mask, bool active_dgrad) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define("channel_similarity(Tensor a, Tensor b, int dim) -> Tensor", tags=_TAGS)


def _linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> _Triple:
    active = Active(order, count, *host_count.tolist())
    grads = backward.linear_backward(
        grad_output, input, input_size, weight, active, output_mask, active_dgrad
    )
    return _complete(grads, weight)


def _conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> _Triple:
    geometry = _geometry(stride, padding, dilation, transposed, output_padding, groups)
    active = Active(order, count, *host_count.tolist())
    grads = backward.conv_backward(
        grad_output, input, input_size, weight, geometry, active, output_mask, active_dgrad
    )
    return _complete(grads, weight)


def _geometry(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ConvGeometry:
    return ConvGeometry(
        tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups
    )


def _complete(grads: Grads, weight: Tensor) -> _Triple:
    """Empty tensors for what was not asked for."""
    grad_input, grad_weight, grad_bias = grads
    return (
        weight.new_empty(0) if grad_input is None else grad_input,
        weight.new_empty(0) if grad_weight is None else grad_weight,
        weight.new_empty(0) if grad_bias is None else grad_bias,
    )


_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("conv_backward", _conv_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("channel_similarity", backward.channel_similarity, "CompositeExplicitAutograd")


@torch.library.register_fake("neq_kernels::linear_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> _Triple:
    return (
        grad_output.new_empty(input_size if output_mask[0] else 0),
        torch.empty_like(weight) if output_mask[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


@torch.library.register_fake("neq_kernels::conv_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> _Triple:
    grad_input = weight.new_empty(0)
    if output_mask[0]:
        # aten's own fake knows the memory format its kernel for this device returns.
        geometry = _geometry(stride, padding, dilation, transposed, output_padding, groups)
        x = grad_output.new_empty(1).expand(input_size) if input is None else input
        dgrad, _, _ = geometry.backward(grad_output, x, weight, (True, False, False))
        assert dgrad is not None
        grad_input = dgrad
    return (
        grad_input,
        torch.empty_like(weight) if output_mask[1] else weight.new_empty(0),
        weight.new_empty(grad_output.shape[1] if output_mask[2] else 0),
    )


@torch.library.register_fake("neq_kernels::channel_similarity", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return a.new_empty((3, a.shape[dim]), dtype=torch.float64)


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Inner products of two outputs, channel by channel.

    Args:
        a, b: same shape, floating point.
        dim: the dimension that enumerates the channels.

    Returns:
        float64 ``[3, K]``: sums of ``a*b``, ``a*a`` and ``b*b`` over all other dimensions.

    Raises:
        ValueError: shapes differ or ``dim`` is out of range.
        TypeError: not floating point.
    """
    if a.shape != b.shape:
        raise ValueError(f"b: expected a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    if not -a.dim() <= dim < a.dim():
        raise ValueError(f"dim: expected one of {a.dim()} dimensions, got {dim}")
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    result: Tensor = torch.ops.neq_kernels.channel_similarity(a, b, dim)
    return result


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    active: ActiveTensors,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """The operator of the same name, with None for what ``output_mask`` does not ask for."""
    grads = torch.ops.neq_kernels.linear_backward(
        grad_output, input, input_size, weight, *active, output_mask, active_dgrad
    )
    return _asked(grads, output_mask)


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    active: ActiveTensors,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """The operator of the same name, with None for what ``output_mask`` does not ask for."""
    g = geometry
    grads = torch.ops.neq_kernels.conv_backward(
        *(grad_output, input, input_size, weight, g.stride, g.padding, g.dilation, g.transposed),
        *(g.output_padding, g.groups, *active, output_mask, active_dgrad),
    )
    return _asked(grads, output_mask)


def _asked(grads: Sequence[Tensor], output_mask: Sequence[bool]) -> Grads:
    dx, dw, db = (g if want else None for g, want in zip(grads, output_mask, strict=True))
    return dx, dw, db


def _n_active(host_count: Tensor, k: int) -> int:
    """K', or K where there is no data to read (meta and fake tensors)."""
    if host_count.is_meta or isinstance(host_count, torch._subclasses.FakeTensor):
        return k
    return int(host_count[0])


def _backward_flops(per_channel: int, k: int, n: int, mask: Sequence[bool], active: bool) -> int:
    dgrad = per_channel * (n if active else k) if mask[0] else 0
    wgrad = per_channel * n if mask[1] else 0
    return dgrad + wgrad


@register_flop_formula(torch.ops.neq_kernels.linear_backward, get_raw=True)
def _linear_flops(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    k, c = weight.shape
    per_channel = 2 * (math.prod(grad_output.shape[:-1])) * c
    return _backward_flops(per_channel, k, _n_active(host_count, k), output_mask, active_dgrad)


@register_flop_formula(torch.ops.neq_kernels.conv_backward, get_raw=True)
def _conv_flops(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    order: Tensor,
    count: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    k = grad_output.shape[1]
    positions = math.prod((input_size if transposed else grad_output.shape)[2:])
    per_channel = 2 * grad_output.shape[0] * positions * (math.prod(weight.shape) // k)
    return _backward_flops(per_channel, k, _n_active(host_count, k), output_mask, active_dgrad)
