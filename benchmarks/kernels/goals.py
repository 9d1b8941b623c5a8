"""What the kernels are held to, and how far the measured rows are from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.common.records import Row

NEVER_SLOWER = 0.97
FEW_CHANNELS = 8


@dataclass(frozen=True)
class Target:
    """A figure over some cells: the geometric mean (``worst``: the smallest) of their ratios."""

    name: str
    over: str
    least: float
    holds: Callable[[Row], bool]
    worst: bool = False


@dataclass(frozen=True)
class Judged:
    """A target, what was measured, over how many cells, and in how many of them it is not met."""

    target: Target
    value: float
    cells: int
    below: int

    @property
    def passes(self) -> bool:
        return self.value >= self.target.least


def _partly(row: Row) -> bool:
    return row["active"] < row["channels"]


def _layout(layout: str) -> Callable[[Row], bool]:
    return lambda row: _partly(row) and row["layout"] == layout


def _whole_depthwise(layout: str) -> Callable[[Row], bool]:
    return lambda row: not _partly(row) and row["kind"] == "depthwise" and row["layout"] == layout


TARGETS = (
    Target("all active, against dense", "dense", NEVER_SLOWER, lambda r: not _partly(r), True),
    Target("fewer active, against dense", "dense", NEVER_SLOWER, _partly, True),
    Target("NCHW, against index_select", "index_select", 1.10, _layout("nchw")),
    Target("NHWC, against index_select", "index_select", 1.40, _layout("nhwc")),
    Target("linear, against index_select", "index_select", 1.00, _layout("rows")),
    Target(
        "fewer than 8 active, against index_select",
        "index_select",
        1.50,
        lambda row: _partly(row) and row["active"] < FEW_CHANNELS,
    ),
    Target(
        "depthwise, against index_select",
        "index_select",
        2.00,
        lambda row: _partly(row) and row["kind"] == "depthwise",
    ),
    Target("depthwise NCHW, all active, against dense", "dense", 2.00, _whole_depthwise("nchw")),
    Target("depthwise NHWC, all active, against dense", "dense", 1.00, _whole_depthwise("nhwc")),
)


def judge(rows: Iterable[Row], provider: str = "neq") -> list[Judged]:
    """Every target that has cells. A cell that was measured in several runs counts with the best of
    them: short means short in every run."""
    judged = []
    timed = [row for row in rows if row["provider"] == provider and "wrong" not in row]
    for target in TARGETS:
        field = f"over_{target.over}_median"
        cells: dict[tuple[object, ...], float] = {}
        for row in timed:
            if field in row and target.holds(row):
                cell = cell_of(row)
                cells[cell] = max(cells.get(cell, 0.0), row[field])
        if not cells:
            continue
        ratios = list(cells.values())
        value = min(ratios) if target.worst else geometric_mean(ratios)
        below = sum(ratio < target.least for ratio in ratios)
        judged.append(Judged(target, value, len(ratios), below))
    return judged


def cell_of(row: Row) -> tuple[object, ...]:
    """What distinguishes a cell from others, whatever the run."""
    return row["network"], row["layer"], row["layout"], row["active"]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def text(judged: Sequence[Judged], mark: Callable[[bool], str]) -> str:
    """A table, one line per target."""
    lines = [f"{'target':<44}  {'least':>5}  {'found':>6}  {'':<10}  cells (below)"]
    for each in judged:
        what = "worst cell" if each.target.worst else "geomean"
        lines.append(
            f"{each.target.name:<44}  {each.target.least:>5.2f}  {each.value:>6.2f}  {what:<10}  "
            f"{each.cells} ({each.below})  {mark(each.passes)}"
        )
    return "\n".join(lines)
