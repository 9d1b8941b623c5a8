"""What a call of a layer comes to, decided once for its shapes and its set of active channels.

Between two changes of the set, a layer is called with the same shapes again and again. The first of
these calls checks its arguments and chooses a strategy; the outcome is kept in ``channels.plans``,
where the others find it. Plans are for eager calls on plain CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.nn import Parameter

from neq_kernels import dispatch
from neq_kernels.autograd import check_unchanged, no_autocast, once
from neq_kernels.backends.cpu import Call
from neq_kernels.channels import ActiveChannels

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_PLAIN = (Tensor, Parameter)
_MOST_PLANS = 64


class Plan:
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
        dispatch.backends_for("cpu"),
        dispatch.revision,
    )


def transformed() -> bool:
    """Whether this eager call is part of a trace or of a function transform."""
    return _get_tracing_state() is not None or _are_functorch_transforms_active()


def keep(channels: ActiveChannels, key: Hashable, plan: Plan | None) -> None:
    """Remember a plan, or that there is none, until the set of active channels changes."""
    if len(channels.plans) >= _MOST_PLANS:
        channels.plans.clear()
    channels.plans[key] = plan


def watched(output: Tensor, channels: ActiveChannels) -> Tensor:
    """``output`` of PyTorch's own graph, whose backward raises RuntimeError if ``channels`` was
    changed after the forward."""
    if output.requires_grad:
        # An in-place activation on a view leaves the view's own hooks behind, not its base's.
        base = output._base if output._is_view() else output
        assert base is not None
        base.register_hook(partial(check_unchanged, channels, channels.generation))
    return output


class _PlannedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        ctx.plan = plan
        reads_input = ctx.needs_input_grad[1] and not plan.stopped
        ctx.save_for_backward(input if reads_input else None, weight)
        return plan.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
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
