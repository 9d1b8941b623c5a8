"""What whole steps are held to, and how far measured ones are from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.records import Row
from benchmarks.kernels.goals import NEVER_SLOWER, geometric_mean
from benchmarks.steps.certainty import WIDEST

# Of the bound with floor.
MEAN_OF_BOUND, LEAST_OF_BOUND = 0.97, 0.90
# Shares of active channels at which no step may be slower than the dense one.
NEVER_SLOWER_AT = (1.0, 0.5)
FLOAT32 = "float32"
OURS = "neq"


@dataclass(frozen=True)
class Judged:
    """A goal, and what was measured.

    Attributes:
        goal: in words.
        figure: what was measured, as text.
        passes: whether the goal is met.
        short: cells that fall short of it.
    """

    goal: str
    figure: str
    passes: bool
    short: Sequence[Row] = ()


def dtype_of(row: Row) -> str:
    """What the forward is computed in; records of version 0.1 do not say."""
    return str(row.get("dtype", FLOAT32))


def cell_of(row: Row) -> tuple[str, str, str, float]:
    """What distinguishes a cell from others."""
    return row["model"], row["layout"], dtype_of(row), float(row["r"])


def name_of(row: Row) -> str:
    """A cell as it is printed."""
    model, layout, dtype, r = cell_of(row)
    return " ".join([model, *([layout] if layout != "any" else []), dtype, f"r={r:g}"])


def short_of(row: Row) -> list[str]:
    """Which goals a cell misses, in words."""
    reasons = []
    if row["ratio_floor"] < LEAST_OF_BOUND:
        reasons.append(f"{row['ratio_floor']:.3f} of the bound with floor")
    if row["r"] in NEVER_SLOWER_AT and row["speedup_median"] < NEVER_SLOWER:
        reasons.append(f"{row['speedup_median']:.3f} of dense")
    return reasons


def ours(rows: Iterable[Row]) -> list[Row]:
    """The timed rows of ours, one for each cell."""
    return [row for row in rows if row["provider"] == OURS and "ratio_floor" in row]


def judge(rows: Iterable[Row]) -> Iterator[Judged]:
    """Every goal, for each dtype by itself."""
    timed = ours(rows)
    for dtype in dict.fromkeys(map(dtype_of, timed)):
        here = [row for row in timed if dtype_of(row) == dtype]
        mean = geometric_mean([row["ratio_floor"] for row in here])
        yield Judged(
            f"{dtype}: of the bound with floor, geomean >= {MEAN_OF_BOUND:g}",
            f"{mean:.3f} over {len(here)} cells",
            mean >= MEAN_OF_BOUND,
        )
        yield _every(
            f"{dtype}: of the bound with floor, no cell < {LEAST_OF_BOUND:g}",
            here,
            lambda row: float(row["ratio_floor"]),
            LEAST_OF_BOUND,
        )
        for r in NEVER_SLOWER_AT:
            at = [row for row in here if row["r"] == r]
            if at:
                yield _every(
                    f"{dtype}: r = {r:g}, never < {NEVER_SLOWER:g} of dense",
                    at,
                    lambda row: float(row["speedup_median"]),
                    NEVER_SLOWER,
                )
        certain = [row for row in here if "wide" in row]  # older records hold no intervals
        wide = [row for row in certain if row["wide"]]
        if certain:
            yield Judged(
                f"{dtype}: 95 % interval of the speed-up at most {100 * WIDEST:g} % wide",
                f"wider: {len(wide)} of {len(certain)}",
                not wide,
                wide,
            )


def _every(goal: str, rows: Sequence[Row], figure: Callable[[Row], float], least: float) -> Judged:
    worst = min(rows, key=figure)
    short = [row for row in rows if figure(row) < least]
    text = f"worst {figure(worst):.3f} ({name_of(worst)}), below: {len(short)} of {len(rows)}"
    return Judged(goal, text, not short, short)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Lines: PASS or FAIL for each goal, then the red cells."""
    for judged in judge(rows):
        yield f"{'PASS' if judged.passes else 'FAIL'}  {judged.goal}: {judged.figure}"
    red = [row for row in ours(rows) if short_of(row)]
    if red:
        yield f"red cells: {len(red)} of {len(ours(rows))}"
        for row in sorted(red, key=lambda row: float(row["ratio_floor"])):
            yield f"  {name_of(row)}: {', '.join(short_of(row))}"
