"""Linear layers and convolutions whose backward computes weight gradients of active channels only.

A plan is looked up, or arguments are checked, and the autograd Function runs. The forward is
PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neq_kernels.autograd import eager
from neq_kernels.autograd.amp import autocast_operands
from neq_kernels.autograd.arguments import (
    GradInput,
    check_grad_input,
    expanded,
    string_padding,
    validate,
)
from neq_kernels.autograd.call_state import (
    all_active,
    learns,
    left_to_pytorch,
    none_active,
    recorded,
    watched,
)
from neq_kernels.autograd.dense import ROWS, constant_where_frozen
from neq_kernels.autograd.embedding import EmbeddingFunction, Lookup, masked_lookup
from neq_kernels.autograd.forward import convolve, detached
from neq_kernels.autograd.functions import (
    ConvFunction,
    LinearFunction,
    active_arguments,
)
from neq_kernels.channels import ActiveChannels, NeuronLayout


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
    if not torch.compiler.is_compiling():
        plan = eager.planned(eager.plan_linear, channels, input, weight, bias, grad_input)
        if plan is not None:
            return plan.run(input, weight, bias)
    if not learns(weight, bias):
        return F.linear(input, weight, bias)
    if left_to_pytorch(input, weight):
        operands = (input, weight, bias)
        return _left_to_pytorch(F.linear, operands, channels, ROWS, -1, grad_input)
    validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return watched(F.linear(input, weight, bias), channels)
    if none_active(channels, weight):
        weight, bias = weight.detach(), detached(bias)
        if not input.requires_grad:
            return F.linear(input, weight, bias)
    out: Tensor = LinearFunction.apply(
        *autocast_operands(input, weight, bias),
        *active_arguments(channels, weight),
        grad_input == "active",
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
    if not torch.compiler.is_compiling():
        called_with = (*arguments, grad_input)
        plan = eager.planned(eager.plan_conv, channels, input, weight, bias, called_with)
        if plan is not None:
            return plan.run(input, weight, bias)
    arguments = expanded(weight, arguments)
    if not learns(weight, bias):
        return convolve(input, weight, bias, *arguments)
    layout = NeuronLayout(groups, axis=1) if transposed else ROWS
    if left_to_pytorch(input, weight):

        def function(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return convolve(input, weight, bias, *arguments)

        operands, channel_dim = (input, weight, bias), 1 - weight.dim()
        return _left_to_pytorch(function, operands, channels, layout, channel_dim, grad_input)
    k = layout.n_neurons(weight)
    validate(input, weight, bias, channels, k, grad_input)
    if all_active(channels, weight):
        return watched(convolve(input, weight, bias, *arguments), channels)
    if none_active(channels, weight):
        weight, bias = weight.detach(), detached(bias)
        if not input.requires_grad:
            return convolve(input, weight, bias, *arguments)
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    if isinstance(arguments[1], str):
        x, numbers = string_padding(x, weight, arguments[1], arguments[0], arguments[2])
        arguments = (arguments[0], numbers, *arguments[2:])
    out: Tensor = ConvFunction.apply(
        *autocast_operands(x, weight, bias),
        *active_arguments(channels, weight),
        grad_input == "active",
        *arguments,
    )
    return out if batched else out.squeeze(0)


def embedding(
    input: Tensor,
    weight: Tensor,
    channels: ActiveChannels,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` whose backward adds up the gradients of active rows (tokens) only.

    Args:
        input: int32 or int64 tokens, any shape.
        weight: ``[K, D]``, floating point.
        channels: the active rows; frozen ones get a gradient of exactly 0 (``sparse=True``: none).
            With none active the weight gets no gradient at all.
        padding_idx, scale_grad_by_freq, sparse: as in ``F.embedding``.

    Returns:
        ``[*input.shape, D]``.

    Raises:
        ValueError: ``channels`` does not fit ``weight``.
        RuntimeError: in backward, when ``channels`` was changed after the forward.
    """
    lookup = Lookup(padding_idx, scale_grad_by_freq, sparse)
    if not learns(weight, None):
        return lookup(input, weight)
    if len(channels) != len(weight):
        raise ValueError(f"channels: expected {len(weight)} channels, got {len(channels)}")
    if left_to_pytorch(input, weight):
        constant = masked(weight, channels)
        # A sparse gradient is for a leaf.
        return lookup._replace(sparse=sparse and constant is weight)(input, constant)
    if recorded(weight):
        return masked_lookup(input, weight, channels, lookup)
    if all_active(channels, weight):
        return watched(lookup(input, weight), channels)
    if none_active(channels, weight):
        return lookup(input, weight.detach())
    output: Tensor = EmbeddingFunction.apply(weight, input, channels, lookup)
    return output


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
    k, either = len(channels), bias if weight is None else weight
    assert either is not None
    for parameter in (weight, bias):
        if parameter is not None and len(parameter) != k:
            raise ValueError(f"channels: expected {len(parameter)} channels, got {k}")
    if all_active(channels, either):
        return weight, bias
    if none_active(channels, either):
        return detached(weight), detached(bias)
    mask = channels.mask_on(either.device)
    if not torch.compiler.is_compiling():
        eager.plan_affine(channels, weight, bias, mask)
    return (
        None if weight is None else constant_where_frozen(weight, mask),
        None if bias is None else constant_where_frozen(bias, mask),
    )


def masked(parameter: Tensor, channels: ActiveChannels, layout: NeuronLayout = ROWS) -> Tensor:
    """A parameter, unchanged, through which only active neurons get a gradient, of any order.

    With everything active it is the parameter itself, with none active it is detached.

    Args:
        parameter: what a layer computes with.
        channels: the active neurons.
        layout: where a neuron lies in ``parameter``.

    Raises:
        ValueError: ``channels`` does not fit.
        RuntimeError (in backward): as :func:`affine`.
    """
    if not learns(parameter, None):
        return parameter
    k = layout.n_neurons(parameter)
    if len(channels) != k:
        raise ValueError(f"channels: expected {k} channels, got {len(channels)}")
    if all_active(channels, parameter):
        return parameter
    if none_active(channels, parameter):
        return parameter.detach()
    return constant_where_frozen(parameter, channels.mask_on(parameter.device), layout)


def _left_to_pytorch(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    operands: tuple[Tensor, Tensor, Tensor | None],
    channels: ActiveChannels,
    layout: NeuronLayout,
    channel_dim: int,
    grad_input: GradInput,
) -> Tensor:
    """The output of a layer whose gradients PyTorch's own graph computes."""
    input, weight, bias = operands
    check_grad_input(grad_input)
    constant_bias = None if bias is None else masked(bias, channels)
    output = function(input, masked(weight, channels, layout), constant_bias)
    if grad_input == "exact" or all_active(channels, weight):
        return output
    neurons = NeuronLayout(axis=output.dim() + channel_dim)
    return constant_where_frozen(output, channels.mask_on(output.device), neurons)
