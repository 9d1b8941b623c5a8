"""The committed times by strategy of every class of CPU, and what its table of costs makes of
them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.files import RESULTS
from benchmarks.kernels.layer_shapes import TINY, problems_by_cell
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.machine import CPU_CLASSES

COSTS = RESULTS / "costs"


@dataclass(frozen=True)
class Cell:
    """One weight gradient.

    Attributes:
        times: microseconds by strategy.
        chosen: by the class's table of costs.
    """

    problem: Problem
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
    return {name: COSTS / f"{name}.csv" for name in CPU_CLASSES if (COSTS / f"{name}.csv").exists()}


def cells(cpu_class: str) -> Iterator[Cell]:
    """Those of real networks, in float32; none for a class that was not measured."""
    path = paths().get(cpu_class)
    if path is None:
        return
    problems, costs = problems_by_cell(), CostModel.of_class(cpu_class)
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        for row in rows:
            problem = problems.get((row["network"], row["layer"], row["layout"]))
            if problem is None or row["network"] == TINY:
                continue
            if row.get("dtype", "float32") != str(torch.float32).removeprefix("torch."):
                continue
            times = {s: float(row[s.name.lower()]) for s in Strategy if row[s.name.lower()]}
            n = int(row["active"])
            yield Cell(problem, n, times, costs.strategy(problem, n, list(times)))
