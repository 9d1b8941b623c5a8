"""How good the tables of costs choose: chosen strategy over the best one, and cells that are slower
than PyTorch's kernel, on the committed measurements.

Four ways: on the cells a table was fitted to; on shapes that were left out of the fit (5-fold); on
a machine of which nothing is known but a calibration (the other machines' tables, scaled by the
cells that a calibration measures, which are not judged); and with a contest where the model is in
doubt, whose winner is chosen by one run and judged by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import cli
from benchmarks.kernels import wgrad_times
from benchmarks.kernels.goals import geometric_mean
from benchmarks.kernels.wgrad_times import Cell, Cells
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch import calibration
from neq_kernels.dispatch.cost_model import CostModel

Choose = Callable[[Cell, Problem, Sequence[Strategy]], Strategy]
Fit = Callable[[Cells], Mapping[str, Mapping[str, Mapping[str, float]]]]
Folds = Callable[[Cells], Iterator[tuple[Cells, Cells]]]

NEVER_SLOWER = 0.97
# A layer with fewer rows of input computes next to nothing.
LEAST_ROWS = 64
COLUMNS = (
    ("class", -15),
    ("dtype", -8),
    ("judged", -22),
    ("cells", 6),
    ("over best", 9),
    ("fewer", 7),
    ("all", 7),
    ("slower", 7),
    ("share", 7),
    ("worst", 6),
    ("few rows", 8),
)


@dataclass(frozen=True)
class Goal:
    """The most that the geometric mean of chosen over best, and the share of cells slower than
    dense, may be."""

    regret: float
    slower: float


IN_SAMPLE = Goal(1.015, 0.0)
LEFT_OUT = Goal(1.03, 0.005)
OTHER_MACHINE = Goal(1.03, 0.01)
WITH_CONTESTS = Goal(1.03, 0.005)


@dataclass(frozen=True)
class Judged:
    """What choosing cost.

    Attributes:
        regret: geometric mean of the chosen strategy's time over the best one's; ``fewer`` and
            ``whole``: of the cells with fewer, or all, channels active.
        slower: cells, of ``large``, slower than dense by more than 3 %; ``small``: the same of
            layers with few rows of input.
        worst: the least speed-up over dense.
        red: the slower ones, and their speed-up.
    """

    cells: int
    regret: float
    fewer: float
    whole: float
    slower: int
    large: int
    small: int
    worst: float
    red: tuple[tuple[Cell, Strategy, float], ...]

    @property
    def share(self) -> float:
        return self.slower / max(1, self.large)

    def meets(self, goal: Goal) -> bool:
        return self.regret <= goal.regret and self.share <= goal.slower


def is_slower(problem: Problem, measured: Mapping[Strategy, float], chosen: Strategy) -> bool:
    """Than dense, by more than 3 %, in a layer large enough to matter."""
    return is_large(problem) and measured[Strategy.DENSE] / measured[chosen] < NEVER_SLOWER


def is_large(problem: Problem) -> bool:
    spatial = 1 if problem.geometry is None else math.prod(problem.input_size[2:])
    return problem.input_size[0] * spatial >= LEAST_ROWS


def judge(cells: Cells, choose: Choose) -> Judged:
    """Choose for every cell."""
    problems = wgrad_times.problems_of(cells)
    regrets: dict[bool, list[float]] = {True: [], False: []}
    red, small, worst = [], 0, math.inf
    for cell, measured in cells.items():
        problem = problems[cell]
        chosen = choose(cell, problem, list(measured))
        regrets[cell.active == problem.neurons].append(measured[chosen] / min(measured.values()))
        speedup = measured[Strategy.DENSE] / measured[chosen]
        worst = min(worst, speedup)
        if is_slower(problem, measured, chosen):
            red.append((cell, chosen, speedup))
        elif speedup < NEVER_SLOWER:
            small += 1
    everything = regrets[True] + regrets[False]
    return Judged(
        len(cells),
        geometric_mean(everything),
        geometric_mean(regrets[False]),
        geometric_mean(regrets[True]),
        len(red),
        sum(is_large(problem) for problem in problems.values()),
        small,
        worst,
        tuple(sorted(red, key=lambda each: each[2])),
    )


def by_model(model: CostModel) -> Choose:
    """Choose by a cost model."""
    return lambda cell, problem, usable: model.strategy(problem, cell.active, usable)


def left_out(cells: Cells, fit: Fit, folds: Folds) -> Judged:
    """Every cell by a table that was fitted to other shapes."""
    chosen = {}
    for learned, judged in folds(cells):
        choose = by_model(CostModel("", fit(learned)))
        problems = wgrad_times.problems_of(judged)
        for cell, measured in judged.items():
            chosen[cell] = choose(cell, problems[cell], list(measured))
    return judge(cells, lambda cell, problem, usable: chosen[cell])


def calibrated(cells: Cells, tables: Sequence[CostModel]) -> tuple[Judged, str | None]:
    """By tables of other machines, as a calibration scales the one that fits best; and its name."""
    problems = wgrad_times.problems_of(cells)
    wanted = {(problem, n) for problem, counts in calibration.canonical() for n in counts}
    seen = {cell for cell in cells if (problems[cell], cell.active) in wanted}
    times = {
        (problems[cell], cell.active, strategy): seconds
        for cell in seen
        for strategy, seconds in cells[cell].items()
    }
    known = calibration.fitted(times, tables)
    model = CostModel() if known.table is None else next(t for t in tables if t.name == known.table)
    rest = {cell: measured for cell, measured in cells.items() if cell not in seen}
    return judge(rest, by_model(model.scaled(known.scales))), known.table


def with_contests(runs: Sequence[Cells], model: CostModel) -> Judged:
    """Where the model is in doubt, by the fastest of its candidates in the first run; judged by the
    second."""
    first, second = runs[:2]

    def choose(cell: Cell, problem: Problem, usable: Sequence[Strategy]) -> Strategy:
        rivals = model.in_doubt(problem, cell.active, usable)
        measured = {s: first[cell][s] for s in rivals if s in first.get(cell, {})}
        if Strategy.DENSE in measured:
            measured[Strategy.DENSE] *= NEVER_SLOWER
        if not measured:
            return model.strategy(problem, cell.active, usable)
        return min(measured, key=lambda s: measured[s])

    return judge(second, choose)


def show(names: Iterable[str], fit: Fit, folds: Folds) -> bool:
    """Print every figure; whether all of them meet their goals."""
    names = list(names)
    runs = {name: wgrad_times.read(wgrad_times.DATA / f"{name}.csv") for name in names}
    every = {name: wgrad_times.typical(some) for name, some in runs.items()}
    tables = {name: CostModel(name, fit(cells)) for name, cells in every.items()}
    table, right, red = cli.Table(COLUMNS), True, []
    for name in names:
        for dtype in sorted({cell.dtype for cell in every[name]}):
            cells = {cell: t for cell, t in every[name].items() if cell.dtype == dtype}
            of_runs = [{c: t for c, t in run.items() if c.dtype == dtype} for run in runs[name]]
            of_runs = [run for run in of_runs if run]
            lines: list[tuple[str, Judged, Goal | None]] = [
                ("in sample", judge(cells, by_model(tables[name])), IN_SAMPLE),
                ("shapes left out", left_out(cells, fit, folds), LEFT_OUT),
            ]
            if dtype == wgrad_times.FLOAT32 and len(names) > 1:
                others = [tables[other] for other in names if other != name]
                judged, chosen = calibrated(cells, others)
                lines.append((f"as {chosen}", judged, OTHER_MACHINE))
            if len(of_runs) > 1:
                lines.append(("with contests", with_contests(of_runs, tables[name]), WITH_CONTESTS))
            for what, judged, goal in lines:
                passes = None if goal is None else judged.meets(goal)
                right &= passes is not False
                table.line([name, dtype, what, *_figures(judged)], _verdict(goal, passes))
                red += [(name, what, *each) for each in judged.red] if passes is False else []
    for name, what, cell, strategy, speedup in red:
        where = " ".join(map(str, cell))
        print(f"{name}, {what}: {speedup:.2f} of dense by {strategy.name.lower()}: {where}")
    return right


def _figures(judged: Judged) -> list[str]:
    return [
        f"{judged.cells}",
        f"{judged.regret:.4f}",
        f"{judged.fewer:.4f}",
        f"{judged.whole:.4f}",
        f"{judged.slower}",
        f"{judged.share:.2%}",
        f"{judged.worst:.2f}",
        f"{judged.small}",
    ]


def _verdict(goal: Goal | None, passes: bool | None) -> str:
    if goal is None:
        return ""
    return cli.verdict(passes, f"(<= {goal.regret:g}, {goal.slower:.1%})")
