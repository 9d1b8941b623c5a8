"""The committed times by strategy of every class of CPU, and what its table of costs makes of
them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels import wgrad_times
from benchmarks.kernels.layer_shapes import TINY
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.machine import CPU_CLASSES


@dataclass(frozen=True)
class Choice:
    """Of a strategy for one weight gradient.

    Attributes:
        times: seconds by strategy, typical of the runs.
        chosen: by the class's table of costs.
    """

    problem: Problem
    dtype: str
    active: int
    times: dict[Strategy, float]
    chosen: Strategy

    @property
    def fastest(self) -> Strategy:
        return min(self.times, key=lambda strategy: self.times[strategy])

    @property
    def regret(self) -> float:
        """How much longer the chosen strategy takes than the fastest."""
        return self.times[self.chosen] / self.times[self.fastest]


def paths() -> dict[str, Path]:
    """The committed files, by class."""
    every = {name: wgrad_times.DATA / f"{name}.csv" for name in CPU_CLASSES}
    return {name: path for name, path in every.items() if path.exists()}


def choices(cpu_class: str) -> Iterator[Choice]:
    """For the layers of real networks; none for a class that was not measured."""
    path = paths().get(cpu_class)
    if path is None:
        return
    cells = wgrad_times.typical(wgrad_times.read(path))
    cells = {cell: times for cell, times in cells.items() if cell.network != TINY}
    problems, costs = wgrad_times.problems_of(cells), CostModel.of_class(cpu_class)
    for cell, times in cells.items():
        chosen = costs.strategy(problems[cell], cell.active, list(times))
        yield Choice(problems[cell], cell.dtype, cell.active, times, chosen)
