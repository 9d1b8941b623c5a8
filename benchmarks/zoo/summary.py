"""What a sweep comes to, beside its goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common import cli
from benchmarks.common.records import Row
from benchmarks.zoo.checks import CHECKS

# ``stop`` has a goal of its own: a gradient that is computed in vain is right.
RESULTS = tuple(name for name in CHECKS if name != "stop")


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Rows with a result that differs from the dense model's, or without any: crashed, or late."""
    return [
        row
        for row in rows
        if any(row.get(name) is False for name in RESULTS) or row.get("built", "") == ""
    ]


def checked(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("mac_share", "") != ""]


@dataclass(frozen=True)
class Goal:
    """``least`` of the models, or for wrong cells at most 0 of them."""

    name: str
    count: Callable[[Sequence[Row]], tuple[int, int]]
    least: float

    def line(self, rows: Sequence[Row]) -> tuple[str, str, str, bool]:
        """What, how many of how many, the goal in words, and whether it is reached."""
        some, all_ = self.count(rows)
        reached = some >= self.least * all_
        return self.name, f"{some} of {all_}", f"{self.least:.0%}", reached


def _right(rows: Sequence[Row]) -> tuple[int, int]:
    asked = [row for row in rows if row.get("built", "") is not False]
    return len(asked) - len(wrong(asked)), len(asked)


def _with_share(least: float) -> Callable[[Sequence[Row]], tuple[int, int]]:
    def count(rows: Sequence[Row]) -> tuple[int, int]:
        some = checked(rows)
        return sum(row["mac_share"] >= least for row in some), len(some)

    return count


def _stops(rows: Sequence[Row]) -> tuple[int, int]:
    asked = [row for row in rows if row.get("stop", "") != ""]
    return sum(row["stop"] is True for row in asked), len(asked)


GOALS = (
    Goal("every result right", _right, 1.0),
    Goal("at least 95 % of the MACs in neurons", _with_share(0.95), 0.95),
    Goal("at least 80 % of the MACs in neurons", _with_share(0.80), 1.0),
    Goal("a frozen bottom half stops backprop", _stops, 0.95),
)


def lines(rows: Sequence[Row]) -> list[str]:
    """For the terminal."""
    built = [row for row in rows if row.get("built", "") is not False]
    result = [f"\n{len(rows)} models, {len(built)} of them built"]
    for goal in GOALS:
        name, count, least, reached = goal.line(rows)
        result.append(f"{name:<40}{count:>12}  goal {least:>5}  {cli.verdict(reached)}")
    return result
