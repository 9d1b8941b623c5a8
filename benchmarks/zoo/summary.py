"""What a sweep comes to, beside its goals. Rows as :func:`benchmarks.common.records.load_csv` reads
them: a cell that could not be asked is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common import cli
from benchmarks.common.records import Row
from benchmarks.zoo.checks import CHECKS

# ``stop`` has a goal of its own: a gradient that is computed in vain is right.
RESULTS = tuple(name for name in CHECKS if name != "stop")
Count = Callable[[Sequence[Row]], tuple[int, int]]


def is_wrong(row: Row) -> bool:
    """Whether a result differs from the dense model's, or there is none: crashed, or late."""
    return any(row.get(name) is False for name in RESULTS) or "built" not in row


def is_exception(row: Row) -> bool:
    """Whether it is to be named."""
    return is_wrong(row) or row.get("stop") is not True or row.get("mac_share", 0.0) < 0.8


@dataclass(frozen=True)
class Goal:
    """A share ``least`` of those models that could be asked. ``count`` returns how many reach it,
    and how many there are."""

    name: str
    count: Count
    least: float

    def line(self, rows: Sequence[Row]) -> tuple[str, str, str, bool]:
        """What, how many of how many, the goal in words, and whether it is reached."""
        some, all_ = self.count(rows)
        return self.name, f"{some} of {all_}", f"{self.least:.0%}", some >= self.least * all_


def _right(rows: Sequence[Row]) -> tuple[int, int]:
    asked = [row for row in rows if "forward" in row or is_wrong(row)]
    return sum(not is_wrong(row) for row in asked), len(asked)


def _with_share(least: float) -> Count:
    def count(rows: Sequence[Row]) -> tuple[int, int]:
        asked = [row for row in rows if "mac_share" in row]
        return sum(row["mac_share"] >= least for row in asked), len(asked)

    return count


def _stops(rows: Sequence[Row]) -> tuple[int, int]:
    asked = [row for row in rows if "stop" in row]
    return sum(row["stop"] for row in asked), len(asked)


GOALS = (
    Goal("every result right", _right, 1.0),
    Goal("at least 95 % of the MACs in neurons", _with_share(0.95), 0.95),
    Goal("at least 80 % of the MACs in neurons", _with_share(0.80), 1.0),
    Goal("a frozen bottom half stops backprop", _stops, 0.95),
)


def lines(rows: Sequence[Row]) -> list[str]:
    """For the terminal."""
    built = sum(row.get("built") is True for row in rows)
    result = [f"\n{len(rows)} models, {built} of them built"]
    for goal in GOALS:
        name, count, least, reached = goal.line(rows)
        result.append(f"{name:<40}{count:>12}  goal {least:>5}  {cli.verdict(reached)}")
    return result
