"""Which choice is fastest for a weight gradient: measured on this machine."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Hashable, Mapping
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from neq_kernels.channels import ActiveChannels
from neq_kernels.gpu_timing import Clock, CudaClock, cold_times
from neq_kernels.problem import Choice, Problem, Strategy

logger = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)

# A strategy must beat PyTorch's own kernel by more than the noise.
_MARGIN = 0.95
# What a gradient may differ from the library's, of its largest element: rounding is far below it, a
# wrong element mostly far above.
_DISAGREEMENT = 0.02


def fastest(
    problem: Problem,
    n: int,
    candidates: Mapping[Choice, ModuleType],
    device: torch.device | str = "cpu",
    seconds: float = 0.05,
    clock: Clock | None = None,
) -> Choice:
    """The fastest of the candidates for ``n`` active channels spread at random.

    Args:
        problem: random values of its shapes are made and thrown away.
        n: 1 to K active channels.
        candidates: choices for this problem, and the module of ``neq_kernels.backends`` that
            computes each. An own kernel of a GPU that cannot run, or is wrong, is passed over with
            a warning.
        device: where to measure.
        seconds: to spend, if one round of all candidates does not take longer.
        clock: of a GPU, where caches are emptied before each call; None makes one.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    dy, x, weight = operands(problem, device)
    channels = spread(n, problem.neurons)
    on_gpu = torch.device(device).type != "cpu"
    calls: dict[Choice, Callable[[], Tensor]] = {
        choice: wgrad(problem, module, choice, dy, x, weight, channels)
        for choice, module in candidates.items()
    }
    if on_gpu:
        calls = _right(calls)
        samples = cold_times(calls, clock or CudaClock(device), seconds)
    else:
        samples = in_turns(calls, seconds)
    medians = {choice: sorted(times)[len(times) // 2] for choice, times in samples.items()}
    if Choice(Strategy.DENSE) in medians:
        medians[Choice(Strategy.DENSE)] *= _MARGIN
    return min(medians, key=lambda choice: medians[choice])


def _right(calls: Mapping[Choice, Callable[[], Tensor]]) -> dict[Choice, Callable[[], Tensor]]:
    """Those that run and agree with the library."""
    expected = calls[Choice(Strategy.DENSE)]()
    allowed = _DISAGREEMENT * expected.abs().max()
    found = {}
    for choice, call in calls.items():
        try:
            off = (call() - expected).abs().max()
            if not off <= allowed:
                raise ArithmeticError(f"its gradient is off by {off:.2e}, allowed {allowed:.2e}")
        except Exception as error:  # whatever a compiler or a launch has to say
            logger.warning("%s is passed over: %s", choice, error)
            continue
        found[choice] = call
    return found


def wgrad(
    problem: Problem,
    backend: ModuleType,
    choice: Choice,
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


def in_turns(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 200,
) -> dict[Name, list[float]]:
    """Seconds of each call, round by round; every round runs each call once, in an order of its
    own: what a call finds in the caches and in the allocator is left there by the one before. One
    round before the first is not recorded."""
    names = list(calls)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    shuffled = random.Random(0)
    start = time.perf_counter()
    for i in range(most_rounds):
        if i >= least_rounds and time.perf_counter() - start > seconds:
            break
        shuffled.shuffle(names)
        for name in names:
            samples[name].append(_seconds(calls[name]))
    return samples


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
