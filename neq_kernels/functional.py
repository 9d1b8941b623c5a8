"""Linear layers and convolutions whose backward computes weight gradients of active channels only.

What a call may be given, and which graph serves it. The forward is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels.autograd import eager
from neq_kernels.autograd.arguments import GradInput
from neq_kernels.autograd.call_state import all_active, stopped
from neq_kernels.autograd.eager import plan_conv, plan_linear
from neq_kernels.autograd.functions import detached, learns, unplanned_conv, unplanned_linear
from neq_kernels.channels import ActiveChannels


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
    known = None if torch.compiler.is_compiling() else eager.circumstances(input, weight, bias)
    if known is None:
        return unplanned_linear(input, weight, bias, channels, grad_input)
    key = (known, grad_input)
    if key in channels.plans:
        plan: eager.LayerPlan | None = channels.plans[key]
    else:
        plan = plan_linear(input, weight, bias, channels, grad_input)
        eager.keep(channels, key, plan)
    if plan is None:
        return unplanned_linear(input, weight, bias, channels, grad_input)
    return plan.run(input, weight, bias)


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
    arguments = (stride, padding, dilation, groups, transposed, output_padding)
    known = None if torch.compiler.is_compiling() else eager.circumstances(input, weight, bias)
    if known is None or list in map(type, arguments):
        return unplanned_conv(input, weight, bias, channels, arguments, grad_input)
    key = (known, arguments, grad_input)
    if key in channels.plans:
        plan: eager.LayerPlan | None = channels.plans[key]
    else:
        plan = plan_conv(input, weight, bias, channels, arguments, grad_input)
        eager.keep(channels, key, plan)
    if plan is None:
        return unplanned_conv(input, weight, bias, channels, arguments, grad_input)
    return plan.run(input, weight, bias)


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
    if stopped(channels, parameters[0]):
        return detached(weight), detached(bias)
    mask = channels.mask_on(parameters[0].device)
    return _constant_where_frozen(weight, mask), _constant_where_frozen(bias, mask)


def _constant_where_frozen(parameter: Tensor | None, mask: Tensor) -> Tensor | None:
    if parameter is None or not parameter.requires_grad:
        return parameter
    # Unlike a Function of ours, this keeps Python out of backward.
    return torch.where(mask, parameter, parameter.detach())
