"""One wgrad problem as a call that can be timed: operands, active channels, the call itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend, BackwardCall
from neq_kernels.backends.problem import KernelChoice, Problem
from neq_kernels.channels import ActiveChannels


def wgrad(
    problem: Problem,
    backend: Backend,
    choice: KernelChoice,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    channels: ActiveChannels,
) -> Callable[[], Tensor]:
    """A call that computes the whole weight gradient, zeros over the frozen rows included."""
    decided: dict[str, Any] = {
        "input_size": input.shape,
        "active": channels.on(weight.device),
        "choice": choice,
    }
    backward: BackwardCall
    if problem.geometry is None:
        backward = partial(backend.linear_backward, **decided)
    else:
        backward = partial(backend.conv_backward, geometry=problem.geometry, **decided)

    def call() -> Tensor:
        gradient = backward(grad_output, input, weight, (False, True, False))[1]
        assert gradient is not None
        return gradient

    return call


def spread(n: int, k: int) -> ActiveChannels:
    """``n`` of ``k`` channels active, chosen at random, always the same."""
    channels = ActiveChannels(k)
    generator = torch.Generator().manual_seed(n)
    channels.set(torch.randperm(k, generator=generator)[:n])
    return channels


def operands(
    problem: Problem, device: torch.device | str = "cpu", *, random: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_output, input and weight of a problem, always the same: random, or, which is sooner
    made, all ones."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (_output_size(problem), problem.input_size, problem.weight_size)
    tensors = [
        torch.randn(shape, generator=generator, device=device).to(problem.dtype)
        if random
        else torch.ones(shape, device=device, dtype=problem.dtype)
        for shape in shapes
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
