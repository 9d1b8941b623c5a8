"""What matters most, one line each, every class of CPU beside the others: from the committed
records alone.

>>> python -m benchmarks.suite.summary
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from benchmarks.common import cli
from benchmarks.common.files import RESULTS
from benchmarks.common.markdown import table
from benchmarks.common.records import Row, load_csv
from benchmarks.kernels import goals as kernel_goals
from benchmarks.kernels.goals import geometric_mean
from benchmarks.steps import goals as step_goals
from benchmarks.suite import cost_data
from neq_kernels.machine import CPU_CLASSES

SUITE, DEMO = RESULTS / "suite", RESULTS / "demo"
MISSING = "–"
# The share of the bound that the steps of version 0.1 were held to.
OF_BOUND = 0.96


def classes() -> list[str]:
    """Those of which anything was measured, in the order of ``machine.CPU_CLASSES``."""
    return [
        name
        for name in CPU_CLASSES
        if (SUITE / name).is_dir() or (DEMO / name).is_dir() or name in cost_data.paths()
    ]


def lines() -> list[str]:
    """The table, as Markdown."""
    found = classes()
    rows = [[what, *(figure(name) or MISSING for name in found)] for what, figure in ROWS.items()]
    return table(["", *found], rows)


def demo_step(scene: str, policy: str) -> Callable[[str], str]:
    """Of a policy in the demo, against dense; in parentheses its bound."""

    def figure(cpu_class: str) -> str:
        path = DEMO / cpu_class / "summary.json"
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        for row in runs:
            if (row["scene"], row["policy"]) == (scene, policy):
                return f"{row['speedup_mean']:.3f} ({row['bound_mean']:.3f})"
        return ""

    return figure


def slower_wgrads(cpu_class: str) -> str:
    """Of the kernel benchmark: everything active / fewer; then the worst."""
    rows = _rows(cpu_class, "kernels")
    parts, worst = [], []
    for whole in (True, False):
        best: dict[tuple[object, ...], float] = {}
        for row in rows:
            is_ours = row["provider"] == "neq" and "over_dense_median" in row
            if is_ours and (row["active"] == row["channels"]) == whole:
                cell = kernel_goals.cell_of(row)
                best[cell] = max(best.get(cell, 0.0), row["over_dense_median"])
        if best:
            parts.append(
                f"{sum(v < kernel_goals.NEVER_SLOWER for v in best.values())} of {len(best):,}"
            )
            worst.append(min(best.values()))
    return f"{' / '.join(parts)}, worst {min(worst):.2f}" if parts else ""


def regret(cpu_class: str) -> str:
    """Of what the cost table chooses, on the times that it was fitted to."""
    found: dict[str, list[float]] = defaultdict(list)
    for choice in cost_data.choices(cpu_class):
        if choice.active < choice.problem.neurons:
            found[choice.dtype].append(choice.regret)
    return _parts(
        {dtype: f"{geometric_mean(r):.3f} over {len(r):,} cells" for dtype, r in found.items()}
    )


def short_steps(bound: str) -> Callable[[str], str]:
    """Steps of which ``bound`` (the column ``ratio`` or ``ratio_floor``) is below ``OF_BOUND``."""
    return _by_dtype(lambda rows: f"{sum(row[bound] < OF_BOUND for row in rows)} of {len(rows)}")


def _mean_of_bound(rows: Sequence[Row]) -> str:
    ratios = [float(row["ratio_floor"]) for row in rows]
    below = sum(ratio < step_goals.LEAST_OF_BOUND for ratio in ratios)
    return f"{geometric_mean(ratios):.3f}, {below} below {step_goals.LEAST_OF_BOUND:g}"


def steps_over_dense(r: float) -> Callable[[str], str]:
    """The slowest step with the share ``r`` of channels active."""

    def figure(rows: Sequence[Row]) -> str:
        at = [row for row in rows if row["r"] == r]
        if not at:
            return MISSING
        worst = min(at, key=lambda row: float(row["speedup_median"]))
        where = " ".join(part for part in step_goals.cell_of(worst)[:2] if part != "any")
        return f"{worst['speedup_median']:.3f} ({where})"

    return _by_dtype(figure)


def _by_dtype(figure: Callable[[Sequence[Row]], str]) -> Callable[[str], str]:
    def text(cpu_class: str) -> str:
        rows = step_goals.ours(_rows(cpu_class, "step"))
        dtypes = dict.fromkeys(map(step_goals.dtype_of, rows))
        return _parts(
            {d: figure([row for row in rows if step_goals.dtype_of(row) == d]) for d in dtypes}
        )

    return text


def _parts(by_dtype: Mapping[str, str]) -> str:
    """Float32 alone needs no name."""
    if list(by_dtype) == [step_goals.FLOAT32]:
        return by_dtype[step_goals.FLOAT32]
    return "; ".join(f"{dtype}: {figure}" for dtype, figure in by_dtype.items())


def _rows(cpu_class: str, part: str) -> list[Row]:
    path = SUITE / cpu_class / f"{part}.csv"
    return load_csv(path)[1] if path.exists() else []


ROWS: dict[str, Callable[[str], str]] = {
    "`make demo`, from scratch: NEq's step against dense (bound)": demo_step("From scratch", "neq"),
    "`make demo`, continued: NEq's step against dense (bound)": demo_step(
        "Continued training", "neq"
    ),
    "`make demo`, continued, stochastic .5 (bound)": demo_step("Continued training", "stochastic"),
    "wgrad slower than dense by > 3 %, everything active / fewer": slower_wgrads,
    "chosen strategy over the best one, geomean, fewer active": regret,
    f"whole steps below {OF_BOUND:g} of the bound": short_steps("ratio"),
    f"whole steps below {OF_BOUND:g} of the bound with floor": short_steps("ratio_floor"),
    "whole steps over the bound with floor, geomean": _by_dtype(_mean_of_bound),
    "slowest step over dense, everything active": steps_over_dense(1.0),
    "slowest step over dense, half of the channels active": steps_over_dense(0.5),
}


def main(arguments: Sequence[str] | None = None) -> int:
    cli.parser(__spec__, __doc__).parse_args(arguments)
    if not classes():
        return cli.user_error(f"no results in {RESULTS}")
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
