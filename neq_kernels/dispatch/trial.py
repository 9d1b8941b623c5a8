"""One wgrad problem as a call that can be timed: operands, active channels, the call itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from neq_kernels.backends.problem import KernelChoice, Problem
from neq_kernels.channels import ActiveChannels


def wgrad(
    problem: Problem,
    backend: ModuleType,
    choice: KernelChoice,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    channels: ActiveChannels,
) -> Callable[[], Tensor]:
    """A call that computes the whole weight gradient, zeros over the frozen rows included."""
    order, n, start = channels.order(weight.device), channels.n_active, channels.start
    wanted = (False, True, False)
    geometry, strategy = problem.geometry, choice.strategy
    settings = {"settings": choice.settings} if choice.settings else {}

    def linear() -> Tensor:
        size = input.shape
        grads = backend.linear_backward(
            grad_output, input, size, weight, order, n, start, wanted, strategy, **settings
        )
        gradient: Tensor = grads[1]
        return gradient

    def conv() -> Tensor:
        grads = backend.conv_backward(
            grad_output, input, weight, geometry, order, n, wanted, strategy, **settings
        )
        gradient: Tensor = grads[1]
        return gradient

    return linear if geometry is None else conv


def spread(n: int, k: int) -> ActiveChannels:
    """``n`` of ``k`` channels active, chosen at random, always the same."""
    channels = ActiveChannels(k)
    generator = torch.Generator().manual_seed(n)
    channels.set(torch.randperm(k, generator=generator)[:n])
    return channels


def operands(problem: Problem, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random grad_output, input and weight of a problem, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (_output_size(problem), problem.input_size, problem.weight_size)
    tensors = [
        torch.randn(shape, generator=generator, device=device).to(problem.dtype) for shape in shapes
    ]
    if problem.channels_last:
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    dy, x, weight = tensors
    return dy, x, weight


def _output_size(problem: Problem) -> tuple[int, ...]:
    g = problem.geometry
    if g is None:
        return problem.input_size[0], problem.weight_size[0]
    with torch.device("meta"):
        x, weight = torch.empty(problem.input_size), torch.empty(problem.weight_size)
    output = torch.convolution(
        x,
        weight,
        None,
        g.stride,
        g.padding,
        g.dilation,
        g.transposed,
        g.output_padding,
        g.groups,
    )
    return tuple(output.shape)
