"""What a call of a layer comes to, decided once for its shapes and its set of active channels.

Between two changes of the set, a layer is called with the same shapes again and again. The first of
these calls checks its arguments and chooses a strategy; the outcome is kept in ``channels.plans``,
where the others find it. Plans are for eager calls on plain CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import (
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.nn import Parameter

from neq_kernels import ops
from neq_kernels.autograd import eager
from neq_kernels.autograd.amp import no_autocast
from neq_kernels.autograd.arguments import GradInput, expanded, validate
from neq_kernels.autograd.call_state import all_active, check_unchanged, transformed, watched
from neq_kernels.autograd.forward import convolution, linear_forward
from neq_kernels.autograd.functions import once
from neq_kernels.backends.cpu import Call
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import backward, selection

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_PLAIN = (Tensor, Parameter)
_MOST_PLANS = 64


class LayerPlan:
    """How a layer is called while ``channels`` does not change.

    Args:
        forward: the library's.
        call: computes the gradients; None: the library's own graph does.
        observed: does it by an operator that dispatch modes can see.
        twice: computes gradients that can be differentiated again; None where that is not possible.
    """

    __slots__ = ("call", "channels", "forward", "generation", "observed", "stopped", "twice")

    def __init__(
        self,
        channels: ActiveChannels,
        forward: Forward,
        call: Call | None = None,
        observed: Call | None = None,
        twice: Call | None = None,
    ) -> None:
        self.channels, self.generation = channels, channels.generation
        self.stopped = channels.n_active == 0
        self.forward, self.call, self.observed, self.twice = forward, call, observed, twice

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        if self.call is None:
            return watched(self.forward(input, weight, bias), self.channels)
        if self.stopped and not input.requires_grad:
            with torch.no_grad():
                return self.forward(input, weight, bias)
        output: Tensor = _PlannedFunction.apply(input, weight, bias, self)
        return output


def circumstances(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on, besides the arguments that are no tensors; None where calls are not
    planned. One look at everything: it is on the way of every call."""
    if (
        type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or not (input.is_cpu and weight.is_cpu)
        or not (weight.requires_grad or (bias is not None and bias.requires_grad))
        or not is_grad_enabled()
        or _is_any_autocast_enabled()
        or transformed()
    ):
        return None
    return (
        input.shape,
        input.stride(),
        input.dtype,
        weight.shape,
        weight.stride(),
        weight.dtype,
        None if bias is None else bias.dtype,
        get_num_threads(),
        selection.backends_for("cpu"),
        selection.revision,
    )


def keep(channels: ActiveChannels, key: Hashable, plan: LayerPlan | None) -> None:
    """Remember a plan, or that there is none, until the set of active channels changes."""
    if len(channels.plans) >= _MOST_PLANS:
        channels.plans.clear()
    channels.plans[key] = plan


class _PlannedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: LayerPlan
    ) -> Tensor:
        ctx.plan = plan
        reads_input = ctx.needs_input_grad[1] and not plan.stopped
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
            or _is_any_autocast_enabled()  # it would change what the library is called with
        ):
            function = _gradients_once if plan.twice is None else _gradients
            return function(ctx, grad_output)
        assert plan.call is not None
        return _called(plan.call, ctx, grad_output)


def _called(call: Call, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias, and None for the plan."""
    input, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if ctx.plan.stopped:
        wanted = (wanted[0], False, False)
    dx, dw, db = call(grad_output, input, weight, wanted)
    return dx, dw, db, None


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Where somebody differentiates this backward, or a mode or a subclass watches it."""
    call = ctx.plan.twice if is_grad_enabled() else ctx.plan.observed
    with no_autocast(grad_output):
        return _called(call, ctx, grad_output)


_gradients_once = once(_gradients)


def plan_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    grad_input: GradInput,
) -> eager.LayerPlan | None:
    """None where the extension does not serve."""
    validate(input, weight, bias, channels, weight.shape[0], grad_input)
    if all_active(channels, weight):
        return eager.LayerPlan(channels, F.linear)
    if grad_input == "active":
        return None
    call = backward.linear_call(input, weight, channels)
    if call is None:
        return None
    size = input.shape

    def observed(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> ops.Grads:
        return ops.linear_backward(grad_output, input, size, weight, channels, wanted[:3], False)

    return eager.LayerPlan(channels, linear_forward, call, observed)


def plan_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    arguments: tuple[Any, ...],
    grad_input: GradInput,
) -> eager.LayerPlan | None:
    """None where the extension does not serve."""
    arguments = expanded(weight, arguments)
    stride, padding, dilation, groups, transposed, output_padding = arguments
    k = weight.shape[1] * groups if transposed else weight.shape[0]
    validate(input, weight, bias, channels, k, grad_input)
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
    if everything and not backward.replaces_library(input, weight, geometry):
        return eager.LayerPlan(channels, forward)
    if grad_input == "active" and not everything:
        return None
    call = backward.conv_call(input, weight, geometry, channels)
    if call is None:
        return eager.LayerPlan(channels, forward) if everything else None
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

    return eager.LayerPlan(channels, forward, call, observed, twice if everything else None)
