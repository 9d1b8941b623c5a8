"""Linear layers and convolutions whose backward computes weight gradients of active channels only.

A plan is looked up, or arguments are checked, and the autograd Function runs. The forward is
PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neq_kernels.autograd import eager
from neq_kernels.autograd.arguments import GradInput, expanded, string_padding, validate
from neq_kernels.autograd.call_state import all_active, learns, none_active, watched
from neq_kernels.autograd.forward import convolve
from neq_kernels.autograd.functions import (
    ConvFunction,
    LinearFunction,
    active_arguments,
    detached,
)
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.sharding import is_sharded, replicated_like


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    *,
    grad_input: GradInput = "exact",
) -> Tensor:
    """``F.linear`` whose backward computes weight and bias gradients of the active features only.

    Args:
        input: ``[..., Cin]``, floating point.
        weight: ``[K, Cin]``, the dtype of ``input`` (autocast's casts apply).
        bias: ``[K]`` or None.
        channels: the active output features; frozen rows get a gradient of exactly 0. With none
            active the weight and the bias get no gradient at all, and the input is not saved.
        grad_input: ``"exact"``: the dense input gradient. ``"active"``: the approximation that
            only active features propagate.

    Returns:
        ``[..., K]``.

    Raises:
        TypeError: integer input or mismatched dtypes.
        ValueError: ``channels`` does not fit ``weight``, or an unknown ``grad_input``.
        RuntimeError: in backward, when ``channels`` was changed after the forward.
    """
    known = None if torch.compiler.is_compiling() else eager.call_key(input, weight, bias)
    if known is not None:
        key = (known, grad_input)
        plan = channels.plans.get(key, eager.MISSING)
        if plan is eager.MISSING:
            plan = eager.plan_linear(input, weight, bias, channels, grad_input)
            eager.keep(channels, key, plan)
        if plan is not None:
            output: Tensor = plan.run(input, weight, bias)
            return output
    if not learns(weight, bias):
        return F.linear(input, weight, bias)
    validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return watched(F.linear(input, weight, bias), channels)
    if is_sharded(weight):
        weight, bias = _sharded_constants(weight, bias, channels, NeuronLayout())
        return watched(F.linear(input, weight, bias), channels)
    if none_active(channels, weight) and not input.requires_grad:
        return F.linear(input, weight.detach(), detached(bias))
    out: Tensor = LinearFunction.apply(
        input, weight, bias, *active_arguments(channels, weight), grad_input == "active"
    )
    return out


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    grad_input: GradInput = "exact",
) -> Tensor:
    """``F.conv{1,2,3}d`` or ``F.conv_transpose{1,2,3}d`` whose backward computes weight and bias
    gradients of the active output channels only.

    Args:
        input: ``[N, Cin, *spatial]`` or unbatched ``[Cin, *spatial]``, floating point.
        weight: ``[K, Cin/groups, *kernel]``; transposed ``[Cin, K/groups, *kernel]``.
        bias: ``[K]`` or None.
        channels: the active output channels; frozen ones get a gradient of exactly 0. With none
            active the weight and the bias get no gradient at all, and the input is not saved.
        stride, padding, dilation, groups, output_padding: as in ``torch.nn.functional``; padding
            may be ``"same"`` or ``"valid"`` when not transposed.
        transposed: a transposed convolution.
        grad_input: ``"exact"`` or the approximation ``"active"``, as in :func:`linear`.

    Returns:
        ``[N, K, *spatial']`` or unbatched ``[K, *spatial']``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`linear`.
    """
    arguments: tuple[Any, ...]
    arguments = (stride, padding, dilation, groups, transposed, output_padding)
    known = None if torch.compiler.is_compiling() else eager.call_key(input, weight, bias)
    if known is not None and list not in map(type, arguments):
        key = (known, arguments, grad_input)
        plan = channels.plans.get(key, eager.MISSING)
        if plan is eager.MISSING:
            plan = eager.plan_conv(input, weight, bias, channels, arguments, grad_input)
            eager.keep(channels, key, plan)
        if plan is not None:
            output: Tensor = plan.run(input, weight, bias)
            return output
    arguments = expanded(weight, arguments)
    if not learns(weight, bias):
        return convolve(input, weight, bias, *arguments)
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    validate(input, weight, bias, channels, k, grad_input)
    if all_active(channels, weight):
        return watched(convolve(input, weight, bias, *arguments), channels)
    if is_sharded(weight):
        layout = NeuronLayout(groups, axis=1) if transposed else NeuronLayout()
        weight, bias = _sharded_constants(weight, bias, channels, layout)
        return watched(convolve(input, weight, bias, *arguments), channels)
    if none_active(channels, weight) and not input.requires_grad:
        return convolve(input, weight.detach(), detached(bias), *arguments)
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    if isinstance(arguments[1], str):
        x, numbers = string_padding(x, weight, arguments[1], arguments[0], arguments[2])
        arguments = (arguments[0], numbers, *arguments[2:])
    out: Tensor = ConvFunction.apply(
        x, weight, bias, *active_arguments(channels, weight), grad_input == "active", *arguments
    )
    return out if batched else out.squeeze(0)


def affine(
    weight: Tensor | None, bias: Tensor | None, channels: ActiveChannels
) -> tuple[Tensor | None, Tensor | None]:
    """The scale and shift of a norm layer, unchanged, with gradients of active entries only.

    With everything active these are the parameters themselves: give the layer's output to
    :func:`neq_kernels.autograd.call_state.watched`.

    Args:
        weight, bias: ``[K]`` or None.
        channels: the active entries. With none active the results need no gradient.

    Raises:
        ValueError: ``channels`` does not fit the parameters.
        RuntimeError (in backward): ``channels`` was changed after the forward; autograd sees that
            the mask it saved was written over.
    """
    if not learns(weight, bias):
        return weight, bias
    parameters = [p for p in (weight, bias) if p is not None]
    if len(channels) != len(parameters[0]):
        raise ValueError(f"channels: expected {len(parameters[0])} channels, got {len(channels)}")
    if all_active(channels, parameters[0]):
        return weight, bias
    if none_active(channels, parameters[0]):
        return detached(weight), detached(bias)
    mask = channels.mask_on(parameters[0].device)
    if is_sharded(parameters[0]):
        mask = replicated_like(parameters[0], mask)
    return _constant_where_frozen(weight, mask), _constant_where_frozen(bias, mask)


def _sharded_constants(
    weight: Tensor, bias: Tensor | None, channels: ActiveChannels, layout: NeuronLayout
) -> tuple[Tensor, Tensor | None]:
    """Tensor parallel: a weight and a bias whose gradients are dense, then masked."""
    if channels.n_active == 0:
        return weight.detach(), detached(bias)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    layout.fill_(mask, channels.order(weight.device)[: channels.n_active], True)
    masked = torch.where(replicated_like(weight, mask), weight, weight.detach())
    if bias is None or not is_sharded(bias):
        return masked, _constant_where_frozen(bias, channels.mask_on(weight.device))
    mask = replicated_like(bias, channels.mask_on(weight.device))
    return masked, _constant_where_frozen(bias, mask)


def _constant_where_frozen(parameter: Tensor | None, mask: Tensor) -> Tensor | None:
    if parameter is None or not parameter.requires_grad:
        return parameter
    # Unlike a Function of ours, this keeps Python out of backward.
    return torch.where(mask, parameter, parameter.detach())
