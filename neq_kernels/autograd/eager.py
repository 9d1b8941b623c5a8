"""Cached execution plans for eager calls: one per input signature, valid until the active set
changes.

Between two changes of the set, a layer is called with the same shapes again and again. The first of
these calls checks its arguments and chooses a kernel; the outcome is kept in ``channels.plans``,
where the others find it. A call like the last one is recognised by the guards of ``torch.compile``,
in one look: between layers, all that a key has to be made of falls out of the CPU's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, get_num_threads, is_grad_enabled, where
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
from neq_kernels.autograd.likeness import Likeness
from neq_kernels.backends.base import BackwardCall, Grads
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import backward as dispatch
from neq_kernels.dispatch.selection import selector

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MISSING = object()
# In ``channels.plans``: what served the last call.
LAST, AFFINE = "last", "affine"
_MOST_PLANS = 64


class AffinePlan:
    """The scale and shift of a norm layer, some of whose entries are active."""

    __slots__ = ("_likeness", "_mask")

    def __init__(self, mask: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._mask, self._likeness = mask, Likeness(weight, bias)

    def run(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Unchanged, with frozen entries as constants; None unless they are like those that the
        plan was made for."""
        if weight is None or bias is None or not self._likeness.fits(weight, bias):
            return None
        mask = self._mask
        return where(mask, weight, weight.detach()), where(mask, bias, bias.detach())


def plan_affine(
    channels: ActiveChannels, weight: Tensor | None, bias: Tensor | None, mask: Tensor
) -> None:
    """Remember how scale and shift are masked in eager calls."""
    if weight is None or bias is None or call_key(weight, bias, None) is None:
        return
    if weight.is_cpu:
        channels.plans[AFFINE] = AffinePlan(mask, weight, bias)


class LayerPlan:
    """How a layer is called while ``channels`` does not change.

    Args:
        forward: PyTorch's.
        observed: computes the gradients by an operator that dispatch modes can see.
        again: computes gradients that can be differentiated again.
        on_gpu: backward may be captured into a CUDA graph, though the forward was not.
        autocast: the dtype that autocast casts the operands to; None: they are as they are.

    Attributes:
        arguments: what else the layer was called with.
        likeness: to that call; None on a GPU, whose calls may be captured.
        call: computes the gradients; None: PyTorch's own graph does.
    """

    __slots__ = (
        *("again", "arguments", "autocast", "call", "channels", "forward", "generation"),
        *("likeness", "none_active", "observed", "on_gpu"),
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
        self.arguments: Hashable = None
        self.likeness: Likeness | None = None

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


def planned(
    make: Callable[..., LayerPlan | None],
    channels: ActiveChannels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: Hashable,
) -> LayerPlan | None:
    """How a call runs, as long as the set of active channels does not change; None where calls are
    not planned.

    Args:
        make: makes a plan from the rest.
        arguments: what else the layer is called with.
    """
    plans = channels.plans
    last: LayerPlan | None = plans.get(LAST)
    if last is not None and last.likeness is not None and last.arguments == arguments:
        operands = (input, weight) if bias is None else (input, weight, bias)
        if last.likeness.fits(*operands):
            return last
    known = call_key(input, weight, bias)
    if known is None:
        return None
    key = (known, arguments)
    try:
        found = plans.get(key, MISSING)
    except TypeError:  # a list has no hash
        return None
    plan: LayerPlan | None
    plan = make(channels, input, weight, bias, arguments) if found is MISSING else found
    if found is MISSING:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
    if plan is not None and input.is_cpu:
        if plan.likeness is None:
            plan.likeness, plan.arguments = Likeness(input, weight, bias), arguments
        plans[LAST] = plan
    return plan


def plan_linear(
    channels: ActiveChannels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    channels: ActiveChannels,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: tuple[Any, ...],
) -> LayerPlan | None:
    """Returns None for the approximate input gradient, unbatched input, padding by name, and
    tensors left to PyTorch."""
    if left_to_pytorch(input, weight):
        return None
    grad_input, arguments = arguments[-1], expanded(weight, arguments[:-1])
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
