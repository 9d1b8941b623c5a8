"""Run the backward of one layer on the selected backend with the selected strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neq_kernels.backends import aten, cpu, reference
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.dispatch.cuda_graphs import captured, clear_frozen, replayed_choice
from neq_kernels.dispatch.selection import (
    _BACKENDS,
    FOR_GPUS,
    Grads,
    backend_for,
    choice_for,
    place_of,
)


def replaces_library(input: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution with every channel active is faster by other means than by
    ``aten.convolution_backward``."""
    if weight.device.type != "cpu" or backend_for("cpu") != "cpu":
        return False
    problem = Problem.conv(input, weight, geometry)
    return choice_for(problem, problem.neurons, place_of("cpu")).strategy != Strategy.DENSE


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    n: int,
    start: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active features first.
        count: int32[1] on the same device, how many are active.
        n: the same number; not looked at while a CUDA graph is captured.
        start: the first of them when they are neighbours, else -1.
        active_dgrad: only active features propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.linear_backward``.

    Raises:
        RuntimeError: ``active_dgrad`` while a CUDA graph is captured.
    """
    k = weight.shape[0]
    place = place_of(weight.device.type)
    if place.backends == ("reference",):
        return reference.linear_backward(
            grad_output, input, input_size, weight, order, n, output_mask, active_dgrad
        )
    choice, replayed = KernelChoice(Strategy.DENSE), captured(weight)
    if replayed or (0 < n < k and (output_mask[1] or output_mask[2])):
        problem = Problem.linear(grad_output.numel() // max(1, k), weight)
        if replayed:
            choice = replayed_choice(problem, place, output_mask, active_dgrad)
            n, start = k, -1
        else:
            choice = choice_for(problem, n, place)
    module = place.module(choice)
    more: dict[str, Any] = {"count": count} if module in FOR_GPUS.values() else {}
    if choice.settings:
        more["settings"] = choice.settings
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.linear_active_dgrad(grad_output, weight, input_size, order, n, module)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.linear_backward(
        grad_output, input, input_size, weight, order, n, start, wanted, choice.strategy, **more
    )
    if replayed and choice.strategy == Strategy.DENSE:
        clear_frozen(grads, NeuronLayout(), order, count)
    return grads if grad_input is None else (grad_input, *grads[1:])


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    count: Tensor,
    n: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active channels first.
        count: int32[1] on the same device, how many are active.
        n: the same number; not looked at while a CUDA graph is captured.
        active_dgrad: only active channels propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.conv_backward``.

    Raises:
        RuntimeError: ``active_dgrad`` while a CUDA graph is captured.
    """
    k = grad_output.shape[1]
    place = place_of(weight.device.type)
    if place.backends == ("reference",):
        return reference.conv_backward(
            grad_output, input, input_size, weight, geometry, order, n, output_mask, active_dgrad
        )
    # Where only the input's shape matters (dgrad alone), nothing is allocated for it.
    x = grad_output.new_empty(1).expand(input_size) if input is None else input
    choice, replayed = KernelChoice(Strategy.DENSE), captured(weight)
    if replayed or (n > 0 and output_mask[1]):
        problem = Problem.conv(x, weight, geometry)
        if replayed:
            choice = replayed_choice(problem, place, output_mask, active_dgrad)
            n = k
        else:
            choice = choice_for(problem, n, place)
    module = place.module(choice)
    more: dict[str, Any] = {"count": count} if module in FOR_GPUS.values() else {}
    if choice.settings:
        more["settings"] = choice.settings
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.conv_active_dgrad(grad_output, x, weight, geometry, order, n)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.conv_backward(
        grad_output, x, weight, geometry, order, n, wanted, choice.strategy, **more
    )
    if replayed and choice.strategy == Strategy.DENSE:
        clear_frozen(grads, geometry.layout, order, count)
    return grads if grad_input is None else (grad_input, *grads[1:])


def linear_call(input: Tensor, weight: Tensor, channels: ActiveChannels) -> cpu.Call | None:
    """Computes the gradients of a linear layer on the CPU in one call, while ``channels`` does not
    change; None where the extension cannot."""
    backend, n = backend_for("cpu"), channels.n_active
    if backend != "cpu":
        return None
    strategy = Strategy.DENSE
    if n > 0:
        problem = Problem.linear(input.numel() // max(1, weight.shape[1]), weight)
        strategy = choice_for(problem, n, place_of("cpu")).strategy
    return cpu.linear_call(weight, channels.order(), n, channels.start, strategy)


def conv_call(
    input: Tensor, weight: Tensor, geometry: ConvGeometry, channels: ActiveChannels
) -> cpu.Call | None:
    """As :func:`linear_call`, for a convolution."""
    backend, n = backend_for("cpu"), channels.n_active
    if backend != "cpu":
        return None
    strategy = Strategy.DENSE
    if n > 0:
        problem = Problem.conv(input, weight, geometry)
        strategy = choice_for(problem, n, place_of("cpu")).strategy
    return cpu.conv_call(input.shape, weight, geometry, channels.order(), n, strategy)


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    result: Tensor = _BACKENDS[backend_for(a.device.type)].channel_similarity(a, b, dim)
    return result
