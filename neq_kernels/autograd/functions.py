"""The autograd Functions for any device, under ``torch.compile`` and under autocast: what is saved,
and who computes backward. In eager on the CPU, ``plans`` has a leaner one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neq_kernels import ops
from neq_kernels.autograd import call_state
from neq_kernels.autograd.amp import autocast_operands, no_autocast
from neq_kernels.autograd.arguments import GradInput, expanded, string_padding, validate
from neq_kernels.autograd.call_state import all_active, check_unchanged, recorded, stopped
from neq_kernels.autograd.forward import convolve, linear_forward
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``once_differentiable``, whose context manager is entered only where it matters."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def chosen(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        function = refusing if torch.is_grad_enabled() else backward
        gradients: tuple[Any, ...] = function(ctx, *grads)
        return gradients

    return chosen


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor | None,
        count: Tensor | None,
        host_count: Tensor | None,
        channels: ActiveChannels | None,
        active_dgrad: bool,
    ) -> Tensor:
        x, w, b = autocast_operands(input, weight, bias)
        _save(ctx, x, w, order, count, host_count, channels, active_dgrad)
        ctx.dtypes = (input.dtype, weight.dtype)
        return linear_forward(x, w, b)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, active, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            grads = ops.linear_backward(
                grad_output, x, ctx.input_size, weight, active, output_mask, ctx.active_dgrad
            )
        return *_cast(grads, ctx.dtypes), None, None, None, None, None


class ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor | None,
        count: Tensor | None,
        host_count: Tensor | None,
        channels: ActiveChannels | None,
        active_dgrad: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
    ) -> Tensor:
        x, w, b = autocast_operands(input, weight, bias)
        _save(ctx, x, w, order, count, host_count, channels, active_dgrad)
        ctx.dtypes = (input.dtype, weight.dtype)
        ctx.geometry = ConvGeometry(
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            transposed,
            tuple(output_padding),
            groups,
        )
        return convolve(x, w, b, stride, padding, dilation, groups, transposed, output_padding)

    @staticmethod
    @once
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, active, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            grads = ops.conv_backward(
                grad_output,
                x,
                ctx.input_size,
                weight,
                ctx.geometry,
                active,
                output_mask,
                ctx.active_dgrad,
            )
        return *_cast(grads, ctx.dtypes), *(None,) * 11


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    order: Tensor | None,
    count: Tensor | None,
    host_count: Tensor | None,
    channels: ActiveChannels | None,
    active_dgrad: bool,
) -> None:
    ctx.channels, ctx.active_dgrad, ctx.input_size = channels, active_dgrad, x.shape
    if channels is None:
        ctx.save_for_backward(x, weight, order, count, host_count)
        return
    ctx.generation = channels.generation
    reads_input = channels.n_active > 0 and ctx.needs_input_grad[1]
    ctx.save_for_backward(x if reads_input else None, weight)


def _restore(ctx: Any) -> tuple[Tensor | None, Tensor, ops.Active, list[bool]]:
    wanted = list(ctx.needs_input_grad[:3])
    if ctx.channels is None:
        x, weight, order, count, host_count = ctx.saved_tensors
        return x, weight, (order, count, host_count), wanted
    channels = _unchanged(ctx)
    x, weight = ctx.saved_tensors
    if channels.n_active == 0:
        wanted[1:] = [False, False]
    return x, weight, channels, wanted


def _unchanged(ctx: Any) -> ActiveChannels:
    check_unchanged(ctx.channels, ctx.generation)
    channels: ActiveChannels = ctx.channels
    return channels


def _cast(
    grads: Sequence[Tensor | None], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor | None, ...]:
    dx, dw, db = grads
    return (
        dx if dx is None or dx.dtype == dtypes[0] else dx.to(dtypes[0]),
        dw if dw is None or dw.dtype == dtypes[1] else dw.to(dtypes[1]),
        db if db is None or db.dtype == dtypes[1] else db.to(dtypes[1]),
    )


def learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a gradient of a parameter is wanted here, and ours would not be in the way."""
    wanted = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    return wanted and torch.is_grad_enabled() and not under_transform()


def under_transform() -> bool:
    """An exported program is for any runtime, and functorch has rules of its own."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return call_state.transformed()


def unplanned_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    grad_input: GradInput,
) -> Tensor:
    """Without a plan."""
    if not learns(weight, bias):
        return F.linear(input, weight, bias)
    validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return call_state.watched(F.linear(input, weight, bias), channels)
    if stopped(channels, weight) and not input.requires_grad:
        return F.linear(input, weight.detach(), detached(bias))
    out: Tensor = LinearFunction.apply(
        input, weight, bias, *selection_of(channels, weight), grad_input == "active"
    )
    return out


def unplanned_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    arguments: tuple[Any, ...],
    grad_input: GradInput,
) -> Tensor:
    """Without a plan."""
    stride, padding, dilation, groups, transposed, output_padding = expanded(weight, arguments)
    arguments = (stride, padding, dilation, groups, transposed, output_padding)
    if not learns(weight, bias):
        return convolve(input, weight, bias, *arguments)
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    validate(input, weight, bias, channels, k, grad_input)
    if all_active(channels, weight):
        return call_state.watched(convolve(input, weight, bias, *arguments), channels)
    if stopped(channels, weight) and not input.requires_grad:
        return convolve(input, weight.detach(), detached(bias), *arguments)
    batched = input.dim() == weight.dim()
    x = input if batched else input.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = string_padding(x, weight, padding, stride, dilation)
        arguments = (stride, padding, *arguments[2:])
    out: Tensor = ConvFunction.apply(
        x, weight, bias, *selection_of(channels, weight), grad_input == "active", *arguments
    )
    return out if batched else out.squeeze(0)


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without a gradient; None stays None."""
    return None if tensor is None else tensor.detach()


def selection_of(channels: ActiveChannels, weight: Tensor) -> tuple[Any, ...]:
    """(order, count, host_count, channels): the tensors where calls are recorded, so that what they
    hold counts when it runs; else the object, and backward can tell whether it was changed."""
    if recorded(weight):
        device = weight.device
        return channels.order(device), channels.count(device), channels.host_count, None
    return None, None, None, channels
