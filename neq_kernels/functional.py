"""Linear layers and convolutions whose backward computes weight gradients of active channels only.

What a call may be given, and which graph serves it. The forward is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from neq_kernels import dispatch, ops, plans
from neq_kernels.autograd import (
    ConvFunction,
    LinearFunction,
    all_active,
    autocasts,
    convolution,
    convolve,
    linear_forward,
    recorded,
    stopped,
)
from neq_kernels.channels import ActiveChannels
from neq_kernels.problem import ConvGeometry

GradInput = Literal["exact", "active"]


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
    known = None if torch.compiler.is_compiling() else plans.circumstances(input, weight, bias)
    if known is None:
        return _linear(input, weight, bias, channels, grad_input)
    key = (known, grad_input)
    if key in channels.plans:
        plan: plans.Plan | None = channels.plans[key]
    else:
        plan = _plan_linear(input, weight, bias, channels, grad_input)
        plans.keep(channels, key, plan)
    if plan is None:
        return _linear(input, weight, bias, channels, grad_input)
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
    known = None if torch.compiler.is_compiling() else plans.circumstances(input, weight, bias)
    if known is None or list in map(type, arguments):
        return _conv(input, weight, bias, channels, arguments, grad_input)
    key = (known, arguments, grad_input)
    if key in channels.plans:
        plan: plans.Plan | None = channels.plans[key]
    else:
        plan = _plan_conv(input, weight, bias, channels, arguments, grad_input)
        plans.keep(channels, key, plan)
    if plan is None:
        return _conv(input, weight, bias, channels, arguments, grad_input)
    return plan.run(input, weight, bias)


def affine(
    weight: Tensor | None, bias: Tensor | None, channels: ActiveChannels
) -> tuple[Tensor | None, Tensor | None]:
    """The scale and shift of a norm layer, unchanged, with gradients of active entries only.

    With everything active these are the parameters themselves: give the layer's output to
    :func:`neq_kernels.plans.watched`.

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


def learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a gradient of a parameter is wanted here, and ours would not be in the way."""
    wanted = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    return wanted and torch.is_grad_enabled() and not _transformed()


def _transformed() -> bool:
    """An exported program is for any runtime, and functorch has rules of its own."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return plans.transformed()


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    grad_input: GradInput,
) -> Tensor:
    """Without a plan."""
    if not learns(weight, bias):
        return F.linear(input, weight, bias)
    _validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return plans.watched(F.linear(input, weight, bias), channels)
    if stopped(channels, weight) and not input.requires_grad:
        return F.linear(input, weight.detach(), detached(bias))
    out: Tensor = LinearFunction.apply(
        input, weight, bias, *_selection(channels, weight), grad_input == "active"
    )
    return out


def _plan_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    grad_input: GradInput,
) -> plans.Plan | None:
    """None where the extension does not serve."""
    _validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return plans.Plan(channels, F.linear)
    if grad_input == "active":
        return None
    call = dispatch.linear_call(input, weight, channels)
    if call is None:
        return None
    size = input.shape

    def observed(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> ops.Grads:
        return ops.linear_backward(grad_output, input, size, weight, channels, wanted[:3], False)

    return plans.Plan(channels, linear_forward, call, observed)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    arguments: tuple[Any, ...],
    grad_input: GradInput,
) -> Tensor:
    """Without a plan."""
    stride, padding, dilation, groups, transposed, output_padding = _expanded(weight, arguments)
    arguments = (stride, padding, dilation, groups, transposed, output_padding)
    if not learns(weight, bias):
        return convolve(input, weight, bias, *arguments)
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    _validate(input, weight, bias, channels, k, grad_input)
    if all_active(channels, weight):
        return plans.watched(convolve(input, weight, bias, *arguments), channels)
    if stopped(channels, weight) and not input.requires_grad:
        return convolve(input, weight.detach(), detached(bias), *arguments)
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _string_padding(x, weight, padding, stride, dilation)
        arguments = (stride, padding, *arguments[2:])
    out: Tensor = ConvFunction.apply(
        x, weight, bias, *_selection(channels, weight), grad_input == "active", *arguments
    )
    return out if batched else out.squeeze(0)


def _plan_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    arguments: tuple[Any, ...],
    grad_input: GradInput,
) -> plans.Plan | None:
    """None where the extension does not serve."""
    arguments = _expanded(weight, arguments)
    stride, padding, dilation, groups, transposed, output_padding = arguments
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    _validate(input, weight, bias, channels, k, grad_input)
    if isinstance(padding, str) or input.dim() != weight.dim():
        return None

    function = convolution(weight, transposed)
    numbers = (
        (stride, padding, output_padding, groups, dilation)
        if transposed
        else (stride, padding, dilation, groups)
    )

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(input, weight, bias, *numbers)

    geometry = ConvGeometry(stride, padding, dilation, transposed, output_padding, groups)
    everything = all_active(channels, weight)
    if everything and not dispatch.replaces_library(input, weight, geometry):
        return plans.Plan(channels, forward)
    if grad_input == "active" and not everything:
        return None
    call = dispatch.conv_call(input, weight, geometry, channels)
    if call is None:
        return plans.Plan(channels, forward) if everything else None
    size = input.shape

    def observed(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> ops.Grads:
        return ops.conv_backward(
            grad_output, input, size, weight, geometry, channels, wanted[:3], False
        )

    def twice(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> ops.Grads:
        assert input is not None
        return geometry.backward(grad_output, input, weight, wanted[:3])

    return plans.Plan(channels, forward, call, observed, twice if everything else None)


def _expanded(weight: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With a number for each dimension."""
    stride, padding, dilation, groups, transposed, output_padding = arguments
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(f"weight: expected 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    if transposed and isinstance(padding, str):
        raise ValueError(f"padding: expected numbers, got {padding!r}")
    return (
        _expand("stride", stride, spatial),
        padding if isinstance(padding, str) else _expand("padding", padding, spatial),
        _expand("dilation", dilation, spatial),
        groups,
        transposed,
        _expand("output_padding", output_padding, spatial),
    )


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without a gradient; None stays None."""
    return None if tensor is None else tensor.detach()


def _selection(channels: ActiveChannels, weight: Tensor) -> tuple[Any, ...]:
    """(order, count, host_count, channels): the tensors where calls are recorded, so that what they
    hold counts when it runs; else the object, and backward can tell whether it was changed."""
    if recorded(weight):
        device = weight.device
        return channels.order(device), channels.count(device), channels.host_count, None
    return None, None, None, channels


def _string_padding(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, tuple[int, ...]]:
    """The input, padded where "same" is asymmetric, and the symmetric rest of the padding."""
    spatial = weight.dim() - 2
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return input, (0,) * spatial
    if any(s != 1 for s in stride):
        raise ValueError(f"padding: 'same' expects stride 1, got {tuple(stride)}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):
        input = F.pad(input, [p for extra in reversed(odd) for p in (0, extra)])
    return input, tuple(t // 2 for t in total)


def _expand(name: str, value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial:
        raise ValueError(f"{name}: expected {spatial} numbers, got {values}")
    return values


def _validate(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    k: int,
    grad_input: str,
) -> None:
    if grad_input not in ("exact", "active"):
        raise ValueError(f"grad_input: expected 'exact' or 'active', got {grad_input!r}")
    if len(channels) != k:
        raise ValueError(f"channels: expected {k} channels, got {len(channels)}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {input.dtype}")
    dtype = input.dtype
    if weight.dtype == dtype and (bias is None or bias.dtype == dtype):
        return
    if autocasts(input):
        return
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected the input's dtype {dtype}, got {tensor.dtype}")
