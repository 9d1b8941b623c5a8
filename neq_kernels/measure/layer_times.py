"""Seconds of each layer's weight gradient, by strategy and number of active channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.conversion.convert import revert
from neq_kernels.dispatch import stopwatch, trial
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import unwrap
from neq_kernels.measure.problems import problems_of
from neq_kernels.measure.timing import Quantiles


@dataclass(frozen=True)
class LayerTime:
    """One layer at one number of active channels.

    Attributes:
        layers: every layer of the model with this problem.
        active: channels, of ``problem.neurons``.
        chosen: the strategy the layer uses.
        seconds: of the weight gradient, by strategy; ``Strategy.DENSE`` with zeros written over the
            frozen rows.
        speedup: of the chosen strategy over all rows by PyTorch's kernel.
    """

    layers: tuple[str, ...]
    problem: Problem
    active: int
    chosen: Strategy
    seconds: dict[Strategy, Quantiles]
    speedup: Quantiles


def layer_times(
    model: nn.Module, *inputs: Any, shares: Sequence[float], seconds: float = 0.2
) -> Iterator[LayerTime]:
    """Measure the distinct linear layers and convolutions of a model, random channels active.

    Args:
        model: converted or not; it is not changed. CPU only.
        inputs: of one forward; or one dict of keyword arguments.
        shares: of active channels, each above 0 and at most 1.
        seconds: for each layer and share.

    Raises:
        ValueError: no layer to measure.
    """
    layers = problems_of(revert(copy.deepcopy(unwrap(model))), *inputs)
    if not layers:
        raise ValueError("model: expected linear layers or convolutions, got none that ran")
    context, dense = selector.context("cpu"), KernelChoice(Strategy.DENSE)
    backend = selector.backends[context.backends[0]]
    for problem in dict.fromkeys(layers.values()):
        names = tuple(name for name, other in layers.items() if other == problem)
        tensors = trial.operands(problem)
        k = problem.neurons
        everything = trial.spread(k, k)
        for n in dict.fromkeys(max(1, round(share * k)) for share in shares):
            channels = trial.spread(n, k)
            calls = {
                strategy: trial.wgrad(problem, backend, KernelChoice(strategy), *tensors, channels)
                for strategy in backend.strategies(problem)
            }
            whole = trial.wgrad(problem, backend, dense, *tensors, everything)
            samples = stopwatch.in_turns({**calls, None: whole}, seconds)
            chosen = selector.choice(problem, n, context).strategy
            ratios = [a / b for a, b in zip(samples[None], samples[chosen], strict=True)]
            yield LayerTime(
                names,
                problem,
                n,
                chosen,
                {strategy: Quantiles.of(samples[strategy]) for strategy in calls},
                Quantiles.of(ratios),
            )
