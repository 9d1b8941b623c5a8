"""The autograd Functions of calls that are not planned: under ``torch.compile``, under autocast,
while a CUDA graph is captured, with tensor subclasses, for the approximate input gradient, and
wherever else ``eager`` makes no plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neq_kernels import ops
from neq_kernels.autograd.amp import autocast_operands, no_autocast
from neq_kernels.autograd.call_state import check_unchanged, recorded, unobserved
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
        x, w, b = autocast_operands(input, weight, bias)
        _save(ctx, x, w, order, count, host_count, channels, active_dgrad)
        ctx.dtypes = (input.dtype, weight.dtype)
        return linear_forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        # With create_graph=True: what comes out refuses to be differentiated.
        if torch.is_grad_enabled():
            return once_differentiable(LinearFunction.backward)(ctx, grad_output)
        x, weight, tensors, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            if tensors is None and unobserved(weight, grad_output):
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        # With create_graph=True: what comes out refuses to be differentiated.
        if torch.is_grad_enabled():
            return once_differentiable(ConvFunction.backward)(ctx, grad_output)
        x, weight, tensors, output_mask = _restore(ctx)
        with no_autocast(grad_output):
            if tensors is None and unobserved(weight, grad_output):
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


def _cast(
    grads: Sequence[Tensor | None], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor | None, ...]:
    dx, dw, db = grads
    return (
        dx if dx is None or dx.dtype == dtypes[0] else dx.to(dtypes[0]),
        dw if dw is None or dw.dtype == dtypes[1] else dw.to(dtypes[1]),
        db if db is None or db.dtype == dtypes[1] else db.to(dtypes[1]),
    )


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without a gradient; None stays None."""
    return None if tensor is None else tensor.detach()


def active_arguments(
    channels: ActiveChannels, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, ActiveChannels | None]:
    """(order, count, host_count, channels) for a Function: the tensors where calls are recorded, so
    that what they hold counts when it runs; else the object, and backward can tell whether it was
    changed."""
    if recorded(weight):
        return *channels.tensors(weight.device), None
    return None, None, None, channels
