"""Cached execution plans for eager calls: one per input signature, valid until the active set
changes.

Between two changes of the set, a layer is called with the same shapes again and again. The first of
these calls checks its arguments and chooses a kernel; the outcome is kept in ``channels.plans``,
where the others find it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack

from neq_kernels import ops
from neq_kernels.autograd import dense
from neq_kernels.autograd.amp import autocast_dtype_on_cpu, no_autocast, operands_as_cast
from neq_kernels.autograd.arguments import GradInput, expanded, validate
from neq_kernels.autograd.call_state import (
    PLAIN,
    all_active,
    check_unchanged,
    left_to_pytorch,
    unplanned,
    watched,
)
from neq_kernels.autograd.forward import convolution, detached, linear_forward
from neq_kernels.backends.base import BackwardCall, Grads
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import backward as dispatch
from neq_kernels.dispatch.selection import selector

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MISSING = object()
_MOST_PLANS = 64


class LayerPlan:
    """How a layer is called while ``channels`` does not change.

    Args:
        forward: PyTorch's.
        observed: computes the gradients by an operator that dispatch modes can see.
        again: computes gradients that can be differentiated again.
        on_gpu: backward may be captured into a CUDA graph, though the forward was not.
        autocast: the dtype that autocast casts the operands to; None: they are as they are.

    Attributes:
        call: computes the gradients; None: PyTorch's own graph does.
    """

    __slots__ = (
        *("again", "autocast", "call", "channels", "forward", "generation"),
        *("none_active", "observed", "on_gpu"),
    )

    def __init__(
        self,
        channels: ActiveChannels,
        forward: Forward,
        observed: BackwardCall | None = None,
        again: BackwardCall | None = None,
        on_gpu: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.channels, self.generation = channels, channels.generation
        self.none_active = channels.n_active == 0
        self.forward, self.observed, self.again = forward, observed, again
        self.call: BackwardCall | None = None
        self.on_gpu, self.autocast = on_gpu, autocast

    def settle(self, call: BackwardCall) -> None:
        """Compute the gradients by ``call`` from now on."""
        self.call = call

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        if self.call is None:
            return watched(self.forward(input, weight, bias), self.channels)
        if self.none_active:
            if not input.requires_grad:
                with torch.no_grad():
                    return self.forward(input, weight, bias)
            # As with requires_grad=False: their hooks do not run.
            weight, bias = weight.detach(), detached(bias)
        output: Tensor
        if self.autocast is None:
            output = _PlannedFunction.apply(input, weight, bias, self)
        else:
            output = _AutocastFunction.apply(input.to(self.autocast), weight, bias, self)
        return output


def call_key(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on, besides the arguments that are no tensors; None where calls are not
    planned. One look at everything: it is on the way of every call."""
    on_cpu = input.is_cpu and weight.is_cpu
    autocast = _is_any_autocast_enabled()
    if (
        type(input) not in PLAIN
        or type(weight) not in PLAIN
        or not (weight.requires_grad or (bias is not None and bias.requires_grad))
        or not is_grad_enabled()
        or (autocast and not on_cpu)
        or unplanned()
        or selector.rehearsal.is_running
        or not (on_cpu or _may_be_planned_on_a_gpu(input, weight))
    ):
        return None
    try:
        return (
            input.shape,
            input.stride(),
            input.dtype,
            weight.shape,
            weight.stride(),
            weight.dtype,
            None if on_cpu else weight.device,
            None if bias is None else bias.dtype,
            get_num_threads(),
            selector.revision,
            autocast and autocast_dtype_on_cpu(),
        )
    except RuntimeError:  # a nested or sparse tensor has no strides
        return None


def _may_be_planned_on_a_gpu(input: Tensor, weight: Tensor) -> bool:
    return input.is_cuda and weight.is_cuda and not selector.rehearsal.captures(weight)


def keep(channels: ActiveChannels, key: Hashable, plan: LayerPlan | None) -> None:
    """Remember a plan, or that there is none, until the set of active channels changes."""
    if len(channels.plans) >= _MOST_PLANS:
        channels.plans.clear()
    channels.plans[key] = plan


def plan_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    grad_input: GradInput,
) -> LayerPlan | None:
    """Returns None for the approximate input gradient, and for tensors left to PyTorch."""
    if left_to_pytorch(input, weight):
        return None
    validate(input, weight, bias, channels, weight.shape[0], grad_input)
    # Raises where the backend that the user asked for cannot be used.
    on_gpu = selector.on_gpu(selector.context(weight.device.type))
    if all_active(channels, weight):
        return LayerPlan(channels, F.linear)
    if grad_input == "active":
        return None
    cast = operands_as_cast(input, weight, bias)
    if cast is None:
        return None
    size = input.shape

    def observed(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
    ) -> Grads:
        tensors = channels.tensors(weight.device)
        return ops.linear_backward(grad_output, input, size, weight, tensors, output_mask, False)

    def again(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
    ) -> Grads:
        mask = channels.mask_on(weight.device)
        return dense.linear_backward(grad_output, input, size, weight, mask, output_mask, False)

    plan = LayerPlan(channels, linear_forward, observed, again, on_gpu, cast.dtype)
    plan.call = dispatch.linear_call(cast.input, cast.weight, channels, plan.settle, cast.in_float)
    return plan


def plan_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    arguments: tuple[Any, ...],
    grad_input: GradInput,
) -> LayerPlan | None:
    """Returns None for the approximate input gradient, unbatched input, padding by name, and
    tensors left to PyTorch."""
    if left_to_pytorch(input, weight):
        return None
    arguments = expanded(weight, arguments)
    stride, padding, dilation, groups, transposed, output_padding = arguments
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    validate(input, weight, bias, channels, k, grad_input)
    # Raises where the backend that the user asked for cannot be used.
    on_gpu = selector.on_gpu(selector.context(weight.device.type))
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
    cast = operands_as_cast(input, weight, bias)
    if everything and (
        cast is None
        or channels.served_densely
        or not dispatch.replaces_dense(cast.input, cast.weight, geometry)
    ):
        return LayerPlan(channels, forward)
    if cast is None or (grad_input == "active" and not everything):
        return None
    size = input.shape

    def observed(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
    ) -> Grads:
        tensors = channels.tensors(weight.device)
        return ops.conv_backward(
            grad_output, input, size, weight, geometry, tensors, output_mask, False
        )

    def again(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
    ) -> Grads:
        mask = channels.mask_on(weight.device)
        return dense.conv_backward(
            grad_output, input, size, weight, geometry, mask, output_mask, False
        )

    plan = LayerPlan(channels, forward, observed, again, on_gpu, cast.dtype)
    plan.call = dispatch.conv_call(
        cast.input, cast.weight, geometry, channels, plan.settle, cast.in_float
    )
    return plan


class _PlannedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: LayerPlan
    ) -> Tensor:
        ctx.plan = plan
        reads_input = ctx.needs_input_grad[1] and not plan.none_active
        ctx.save_for_backward(input if reads_input else None, weight)
        return plan.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        plan: LayerPlan = ctx.plan
        check_unchanged(plan.channels, plan.generation)
        if (
            is_grad_enabled()
            or _len_torch_dispatch_stack() > 0
            or type(grad_output) is not Tensor
            or _is_any_autocast_enabled()  # it would change what PyTorch is called with
            or (plan.on_gpu and selector.rehearsal.captures(grad_output))
        ):
            return _gradients(ctx, grad_output)
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        output_mask = (needed[0], False, False) if plan.none_active else needed[:3]
        assert plan.call is not None
        dx, dw, db = plan.call(grad_output, input, weight, output_mask)
        return dx, dw, db, None


class _AutocastFunction(_PlannedFunction):
    """The weight is cast here, not before: what autograd would record to cast its gradient back,
    row by row of zeros, the kernels do while they write it."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: LayerPlan
    ) -> Tensor:
        assert plan.autocast is not None
        ctx.plan, ctx.weight, ctx.version = plan, weight, weight._version
        weight = weight.to(plan.autocast)
        bias = None if bias is None else bias.to(plan.autocast)
        reads_input = ctx.needs_input_grad[1] and not plan.none_active
        ctx.save_for_backward(input if reads_input else None, weight)
        return plan.forward(input, weight, bias)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Where somebody differentiates this backward, a mode or a subclass watches it, or a CUDA graph
    captures it."""
    call = ctx.plan.again if is_grad_enabled() else ctx.plan.observed
    input, weight = ctx.saved_tensors
    if is_grad_enabled() and ctx.plan.autocast is not None:
        weight = _differentiably_cast(ctx)
    needed = ctx.needs_input_grad
    output_mask = (needed[0], False, False) if ctx.plan.none_active else needed[:3]
    with no_autocast(grad_output):
        return *call(grad_output, input, weight, output_mask), None


def _differentiably_cast(ctx: Any) -> Tensor:
    """The weight as autocast cast it; what was saved of that has no history."""
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "a weight was modified in place between a forward under autocast and a backward that "
            f"is differentiated: expected version {ctx.version}, got {ctx.weight._version}"
        )
    weight: Tensor = ctx.weight.to(ctx.plan.autocast)
    return weight
