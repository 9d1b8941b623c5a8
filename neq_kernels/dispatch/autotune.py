"""Autotuning: time every candidate kernel for one wgrad problem and return the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend
from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.dispatch.stopwatch import Clock, CudaClock, cold_times, in_turns
from neq_kernels.dispatch.trial import operands, spread, wgrad

logger = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)

# A strategy must beat PyTorch's kernel by more than the noise.
_MARGIN = 0.95
# What a gradient may differ from PyTorch's, of its largest element: rounding is far below it, a
# wrong element mostly far above.
_DISAGREEMENT = 0.02


def fastest(
    problem: Problem,
    n: int,
    candidates: Mapping[KernelChoice, Backend],
    device: torch.device | str = "cpu",
    seconds: float = 0.05,
    clock: Clock | None = None,
) -> KernelChoice:
    """The fastest of the candidates for ``n`` active channels spread at random.

    Args:
        problem: random values of its shapes are made and thrown away.
        n: 1 to K active channels.
        candidates: choices for this problem, and the backend that runs each. A custom kernel of a
            GPU that cannot run, or is wrong, is passed over with a warning.
        device: where to measure.
        seconds: to spend, if one round of all candidates does not take longer.
        clock: of a GPU, where caches are emptied before each call; None makes one.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    dy, x, weight = operands(problem, device)
    channels = spread(n, problem.neurons)
    on_gpu = torch.device(device).type != "cpu"
    calls: dict[KernelChoice, Callable[[], Tensor]] = {
        choice: wgrad(problem, backend, choice, dy, x, weight, channels)
        for choice, backend in candidates.items()
    }
    if on_gpu:
        calls = _right(calls)
        samples = cold_times(calls, clock or CudaClock(device), seconds)
    else:
        samples = in_turns(calls, seconds)
    medians = {choice: sorted(times)[len(times) // 2] for choice, times in samples.items()}
    if KernelChoice(Strategy.DENSE) in medians:
        medians[KernelChoice(Strategy.DENSE)] *= _MARGIN
    return min(medians, key=lambda choice: medians[choice])


def _right(
    calls: Mapping[KernelChoice, Callable[[], Tensor]],
) -> dict[KernelChoice, Callable[[], Tensor]]:
    """Those that run and agree with PyTorch's gradient."""
    expected = calls[KernelChoice(Strategy.DENSE)]()
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
