"""The autograd Functions of calls that are not planned: under ``torch.compile``, under
autocast on a GPU, while a CUDA graph is captured, with tensor subclasses, for the approximate input
gradient, and wherever else ``eager`` makes no plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq_kernels import ops
from neq_kernels.autograd import dense
from neq_kernels.autograd.amp import no_autocast
from neq_kernels.autograd.call_state import check_unchanged, recorded, transformed, unobserved
from neq_kernels.autograd.forward import convolve, linear_forward
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import backward as dispatch


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
        _save(ctx, input, weight, order, count, host_count, channels, active_dgrad)
        return linear_forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, tensors, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            if _is_differentiated():
                grads = dense.linear_backward(
                    *(grad_output, x, ctx.input_size, weight),
                    *(_mask(ctx, weight), output_mask, ctx.active_dgrad),
                )
            elif tensors is None and unobserved(weight, grad_output):
                active = ctx.channels.on(weight.device)
                grads = dispatch.linear_backward(
                    *(grad_output, x, ctx.input_size, weight),
                    *(active, output_mask, ctx.active_dgrad),
                )
            else:
                tensors = tensors or ctx.channels.tensors(weight.device)
                grads = ops.linear_backward(
                    *(grad_output, x, ctx.input_size, weight),
                    *(tensors, output_mask, ctx.active_dgrad),
                )
        return *grads, None, None, None, None, None


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
        _save(ctx, input, weight, order, count, host_count, channels, active_dgrad)
        ctx.geometry = ConvGeometry(
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            transposed,
            tuple(output_padding),
            groups,
        )
        return convolve(
            *(input, weight, bias, stride, padding, dilation),
            *(groups, transposed, output_padding),
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, tensors, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            if _is_differentiated():
                grads = dense.conv_backward(
                    *(grad_output, x, ctx.input_size, weight, ctx.geometry),
                    *(_mask(ctx, weight), output_mask, ctx.active_dgrad),
                )
            elif tensors is None and unobserved(weight, grad_output):
                active = ctx.channels.on(weight.device)
                grads = dispatch.conv_backward(
                    *(grad_output, x, ctx.input_size, weight, ctx.geometry),
                    *(active, output_mask, ctx.active_dgrad),
                )
            else:
                tensors = tensors or ctx.channels.tensors(weight.device)
                grads = ops.conv_backward(
                    *(grad_output, x, ctx.input_size, weight, ctx.geometry),
                    *(tensors, output_mask, ctx.active_dgrad),
                )
        return *grads, *(None,) * 11


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


def _restore(ctx: Any) -> tuple[Tensor | None, Tensor, ops.ActiveTensors | None, list[bool]]:
    """Input, weight, the tensors of the active channels where the call was recorded, and which
    gradients to compute."""
    output_mask = list(ctx.needs_input_grad[:3])
    if ctx.channels is None:
        x, weight, order, count, host_count = ctx.saved_tensors
        return x, weight, (order, count, host_count), output_mask
    check_unchanged(ctx.channels, ctx.generation)
    x, weight = ctx.saved_tensors
    if ctx.channels.n_active == 0:
        output_mask[1:] = [False, False]
    return x, weight, None, output_mask


def _is_differentiated() -> bool:
    """Whether somebody differentiates this backward, or transforms it (``is_grads_batched``)."""
    return torch.is_grad_enabled() or (not torch.compiler.is_compiling() and transformed())


def _mask(ctx: Any, weight: Tensor) -> Tensor:
    """bool[K] on the weight's device, True where active."""
    if ctx.channels is not None:
        channels: ActiveChannels = ctx.channels
        return channels.mask_on(weight.device)
    _, _, order, count, _ = ctx.saved_tensors
    is_active: Tensor = torch.arange(len(order), device=order.device) < count
    return is_active.scatter(0, order, is_active)


def active_arguments(
    channels: ActiveChannels, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, ActiveChannels | None]:
    """(order, count, host_count, channels) for a Function: the tensors where calls are recorded, so
    that what they hold counts when it runs; else the object, and backward can tell whether it was
    changed."""
    if recorded(weight):
        return *channels.tensors(weight.device), None
    return None, None, None, channels
