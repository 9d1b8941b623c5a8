"""Seconds of weight gradients by strategy: what tables of costs are fitted to and judged by.

One file for each class of machine, ``results/costs/<class>.csv``, with one line for each run and
cell; written from records of ``benchmarks.kernels.cpu --strategies``.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common.files import RESULTS
from benchmarks.common.records import Row, load
from benchmarks.kernels.goals import geometric_mean
from benchmarks.kernels.layer_shapes import problems_by_cell
from neq_kernels.backends.problem import Problem, Strategy

DATA = RESULTS / "costs"
FLOAT32 = "float32"


class Cell(NamedTuple):
    """A weight gradient with some channels active."""

    dtype: str
    network: str
    layer: str
    layout: str
    active: int


Cells = dict[Cell, dict[Strategy, float]]


def read_record(path: Path) -> dict[int, Cells]:
    """Median seconds by run.

    Raises:
        FileNotFoundError, ValueError: no such record, or one without strategies.
    """
    runs: dict[int, Cells] = defaultdict(lambda: defaultdict(dict))
    for row in load(path)[1]:
        strategy = _strategy(row)
        if strategy is not None and "wrong" not in row:
            names = (row[name] for name in ("network", "layer", "layout", "active"))
            cell = Cell(row.get("dtype", FLOAT32), *names)
            runs[row["run"]][cell][strategy] = row["seconds_median"]
    if not runs:
        raise ValueError(f"{path}: expected a record of benchmarks.kernels.cpu --strategies")
    return {run: dict(cells) for run, cells in runs.items()}


def write(path: Path, runs: Sequence[Cells]) -> None:
    """Microseconds, one line for each cell of each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", *Cell._fields, *(s.name.lower() for s in Strategy)])
        for run, cells in enumerate(runs):
            for cell, seconds in cells.items():
                times = (f"{seconds[s] * 1e6:.4g}" if s in seconds else "" for s in Strategy)
                writer.writerow([run, *cell, *times])


def read(path: Path) -> list[Cells]:
    """What :func:`write` wrote, run by run."""
    runs: dict[int, Cells] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            names = (row[name] for name in Cell._fields[:-1])
            runs[int(row["run"])][Cell(*names, int(row["active"]))] = {
                s: float(row[s.name.lower()]) / 1e6 for s in Strategy if row[s.name.lower()]
            }
    return [runs[run] for run in sorted(runs)]


def typical(runs: Iterable[Cells]) -> Cells:
    """Of each cell and strategy the geometric mean over the runs. Runs differ more than the
    strategies within one do, which are timed in turns: their ratios are kept."""
    every: dict[Cell, dict[Strategy, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cells in runs:
        for cell, seconds in cells.items():
            for strategy, time in seconds.items():
                every[cell][strategy].append(time)
    return {
        cell: {strategy: geometric_mean(times) for strategy, times in seconds.items()}
        for cell, seconds in every.items()
    }


def problems_of(cells: Iterable[Cell]) -> dict[Cell, Problem]:
    """The problem of each cell."""
    known: Mapping[tuple[str, str, str], Problem] = problems_by_cell()
    return {
        cell: known[cell.network, cell.layer, cell.layout]._replace(
            dtype=getattr(torch, cell.dtype)
        )
        for cell in cells
    }


def _strategy(row: Row) -> Strategy | None:
    provider = row.get("provider", "")
    name = provider.removeprefix("neq ").upper()
    return Strategy[name] if provider.startswith("neq ") and name in Strategy.__members__ else None
