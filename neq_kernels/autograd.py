"""The autograd Functions for any device, under ``torch.compile`` and under autocast: what is saved,
and who computes backward. In eager on the CPU, ``plans`` has a leaner one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neq_kernels import dispatch, ops
from neq_kernels.channels import ActiveChannels
from neq_kernels.problem import ConvGeometry

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``once_differentiable``, whose context manager is entered only where it matters."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def chosen(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        function = refusing if torch.is_grad_enabled() else backward
        gradients: tuple[Any, ...] = function(ctx, *grads)
        return gradients

    return chosen


def recorded(parameter: Tensor) -> bool:
    """Whether what runs now is recorded, by ``torch.compile`` or into a CUDA graph, to run again
    with other channels active."""
    return torch.compiler.is_compiling() or dispatch.captured(parameter)


def all_active(channels: ActiveChannels, parameter: Tensor) -> bool:
    """Whether PyTorch's own graph serves: every channel is active, and will be."""
    return not recorded(parameter) and channels.n_active == len(channels)


def stopped(channels: ActiveChannels, parameter: Tensor) -> bool:
    """Whether nothing is to be computed: no channel is active, or will be."""
    return not recorded(parameter) and channels.n_active == 0


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
        x, w, b = _autocast(input, weight, bias)
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
        x, w, b = _autocast(input, weight, bias)
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


def check_unchanged(channels: ActiveChannels, generation: int, grad: Tensor | None = None) -> None:
    """Raise if the set of active channels is not that of ``generation``; can be a gradient hook."""
    if channels.generation != generation:
        raise RuntimeError(
            "the active channels of a layer were changed between its forward and its backward: "
            f"expected generation {generation}, got {channels.generation}; call set(), reset() "
            "and controller.step() only after backward"
        )


def _cast(
    grads: Sequence[Tensor | None], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor | None, ...]:
    dx, dw, db = grads
    return (
        dx if dx is None or dx.dtype == dtypes[0] else dx.to(dtypes[0]),
        dw if dw is None or dw.dtype == dtypes[1] else dw.to(dtypes[1]),
        db if db is None or db.dtype == dtypes[1] else db.to(dtypes[1]),
    )


def autocasts(tensor: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    device_type = tensor.device.type
    # Asking about a device without autocast, such as meta, is an error.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not autocasts(input):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(input), cast(weight), None if bias is None else cast(bias)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A backward called inside autocast must not cast what the forward did not."""
    if autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in the forward of a Function."""
    out = F.linear(input, weight, bias)
    if not torch.compiler.is_compiling() and out._is_view():
        # Of the library's own making; autograd would refuse in-place activations on it.
        out = torch.ops.aten._unsafe_view(out, out.shape)
    return out


def convolution(weight: Tensor, transposed: bool) -> Callable[..., Tensor]:
    """The library's function for as many dimensions."""
    functions: tuple[Callable[..., Tensor], ...] = _CONV_TRANSPOSE if transposed else _CONV
    return functions[weight.dim() - 3]


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    function = convolution(weight, transposed)
    if transposed:
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return function(input, weight, bias, stride, padding, dilation, groups)
