"""Fit the tables of costs that strategies are chosen by, one for each class of machine.

>>> python -m benchmarks.kernels.cpu --strategies --networks NAME ... tiny --out runs/strategies
>>> python -m benchmarks.kernels.fit_cost_model runs/strategies/kernels.jsonl  # of this machine
>>> python -m benchmarks.kernels.fit_cost_model          # every class again, from results/costs
>>> python -m benchmarks.kernels.fit_cost_model --check  # are the shipped tables these, and good?

A time is linear in what is read, written and multiplied, with coefficients for each kind of layer
and layout, none of them negative; the least of them are left out until ``MOST`` are left. Where a
strategy loses though its predicted time is lower, the prediction is multiplied by a margin.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.common import cli
from benchmarks.common.records import load
from benchmarks.kernels import regret, wgrad_times
from benchmarks.kernels.wgrad_times import Cell, Cells
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch import cost_model
from neq_kernels.dispatch.cost_model import MARGIN

# Coefficients and margins of one strategy, for one dtype on one class of machine.
MOST = 40
# Which features each strategy can depend on.
_READ = ("calls", "input", "active output", "output", "active weight", "weight")
FEATURES = {
    Strategy.DENSE: ("calls", "input", "output", "weight", "all products"),
    Strategy.PACK: (*_READ, "blocked products"),
    Strategy.CUSTOM: (*_READ, "products"),
}
# A group keeps at least these: what a call costs, and what a product does.
_LEAST = 2
_ROUNDS = 10
# Below this error, in logarithms, it is noise.
_NOISE = 0.03
FOLDS = 5
_MARGINS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 2.0)
# What one cell slower than PyTorch's kernel counts, beside logarithms of times; and the least that
# a margin has to spare.
_PENALTY, _WORTH = 1.0, 0.3

Group = str
Table = dict[Group, dict[str, float]]


@dataclass
class _Fit:
    """The measurements of one group, and the features it still depends on."""

    names: list[str]
    matrix: np.ndarray
    measured: np.ndarray

    def solve(self, kept: Sequence[int]) -> tuple[dict[str, float], float]:
        """Coefficients that make the sum of absolute errors, in logarithms, small, and that sum."""
        relative = self.matrix[:, kept] / self.measured[:, None]
        scale = np.abs(relative).max(axis=0)
        scale[scale == 0] = 1
        relative = relative / scale
        weights = np.ones(len(self.measured))
        for _ in range(_ROUNDS):
            solution, _ = nnls(relative * weights[:, None], weights)
            off = np.abs(np.log(np.maximum(relative @ solution, 1e-3)))
            weights = 1 / np.sqrt(np.maximum(off, _NOISE))
        found = solution / scale
        return {self.names[i]: float(v) for i, v in zip(kept, found, strict=True)}, off.sum()


def fit(cells: Cells) -> dict[str, Table]:
    """The table of a class of machine, by dtype."""
    by_dtype: dict[str, Cells] = defaultdict(dict)
    for cell, seconds in cells.items():
        by_dtype[cell.dtype][cell] = seconds
    return {dtype: _fit(some) for dtype, some in by_dtype.items()}


def _fit(cells: Cells) -> Table:
    """Of one dtype: once to see which groups need a margin, then with room for these, and no
    others."""
    problems = wgrad_times.problems_of(cells)
    _, margins = _fit_with(cells, problems, dict.fromkeys(Strategy, MOST), None)
    most = {s: MOST - sum(_is_of(group, s) for group in margins) for s in Strategy}
    coefficients, margins = _fit_with(cells, problems, most, margins)
    return {
        group: costs | ({MARGIN: margins[group]} if group in margins else {})
        for group, costs in sorted(coefficients.items())
    }


def _fit_with(
    cells: Cells,
    problems: Mapping[Cell, Problem],
    most: Mapping[Strategy, int],
    among: Collection[Group] | None,
) -> tuple[Table, dict[Group, float]]:
    """Coefficients, and the margins above 1, which come from predictions of shapes that were left
    out, and of all."""
    coefficients = _coefficients(cells, problems, most)
    left_out: dict[Cell, Table] = {}
    for learned, judged in folds(cells):
        left_out |= dict.fromkeys(judged, _coefficients(learned, problems, most))
    margins = _margins(cells, problems, left_out, {}, among)
    margins = _margins(cells, problems, dict.fromkeys(cells, coefficients), margins, among)
    return coefficients, {group: margin for group, margin in margins.items() if margin > 1}


def _is_of(group: Group, strategy: Strategy) -> bool:
    return group.startswith(f"{strategy.name.lower()} ")


def folds(cells: Cells) -> Iterator[tuple[Cells, Cells]]:
    """What is learned from and what is judged: every fifth shape of each kind, by size, with all
    its layouts and numbers of active channels."""
    problems = wgrad_times.problems_of(cells)
    shapes = {cell: problem._replace(channels_last=False) for cell, problem in problems.items()}
    kinds: dict[str, set[Problem]] = defaultdict(set)
    for shape in shapes.values():
        kinds[cost_model.kind(shape)].add(shape)
    fold_of = {}
    for some in kinds.values():
        order = sorted(some, key=lambda p: (math.prod(p.weight_size) * p.output_positions, p[:2]))
        fold_of |= dict(zip(order, itertools.cycle(range(FOLDS)), strict=False))
    for fold in range(FOLDS):
        here = {cell for cell in cells if fold_of[shapes[cell]] == fold}
        yield (
            {cell: seconds for cell, seconds in cells.items() if cell not in here},
            {cell: seconds for cell, seconds in cells.items() if cell in here},
        )


def _coefficients(
    cells: Cells, problems: Mapping[Cell, Problem], most: Mapping[Strategy, int]
) -> Table:
    rows: dict[Group, list[tuple[dict[str, float], float]]] = defaultdict(list)
    for cell, seconds in cells.items():
        features = cost_model.features(problems[cell], cell.active)
        for strategy, measured in seconds.items():
            rows[cost_model.group(problems[cell], strategy)].append((features, measured))
    table: Table = {}
    for strategy in Strategy:
        names = list(FEATURES[strategy])
        fits = {
            group: _Fit(
                names,
                np.array([[features[name] for name in names] for features, _ in some]),
                np.array([measured for _, measured in some]),
            )
            for group, some in rows.items()
            if _is_of(group, strategy)
        }
        table |= _with_the_best(fits, most[strategy])
    return table


def _with_the_best(fits: Mapping[Group, _Fit], most: int) -> Table:
    """Coefficients of several groups, ``most`` altogether."""
    kept: dict[Group, list[int]] = {}
    errors: dict[Group, float] = {}
    for group, each in fits.items():
        every, errors[group] = each.solve(range(len(each.names)))
        kept[group] = [i for i, name in enumerate(each.names) if every[name] > 0]

    def without_one(group: Group) -> tuple[float, list[int]]:
        """The least that leaving out a feature adds to the error, and what is left then."""
        if len(kept[group]) <= _LEAST:
            return math.inf, kept[group]
        fewer = [[j for j in kept[group] if j != i] for i in kept[group]]
        return min((fits[group].solve(some)[1] - errors[group], some) for some in fewer)

    next_step = {group: without_one(group) for group in fits}
    while sum(map(len, kept.values())) > most:
        group = min(next_step, key=lambda g: next_step[g][0])
        added, kept[group] = next_step[group]
        errors[group] += added
        next_step[group] = without_one(group)
    return {
        group: {name: value for name, value in each.solve(kept[group])[0].items() if value > 0}
        for group, each in fits.items()
    }


def _margins(
    cells: Cells,
    problems: Mapping[Cell, Problem],
    tables: Mapping[Cell, Table],
    least: Mapping[Group, float],
    among: Collection[Group] | None,
) -> dict[Group, float]:
    """For each group, by what to multiply its predictions so that choosing costs least; of no
    group less than ``least``.

    Args:
        tables: by which each cell's times are predicted.
        among: the groups that may have a margin; None: all.
    """
    known: dict[Group, list[tuple[Cell, dict[Strategy, float]]]] = defaultdict(list)
    for cell, seconds in cells.items():
        features = cost_model.features(problems[cell], cell.active)
        groups = {s: cost_model.group(problems[cell], s) for s in seconds}
        costs = tables[cell]
        times = {
            s: cost_model.linear(costs[group], features)
            for s, group in groups.items()
            if group in costs
        }
        for strategy in times:
            if strategy != Strategy.DENSE:
                known[groups[strategy]].append((cell, times))
    margins = {group: least.get(group, 1.0) for group in known}
    low = dict(margins)

    def loss(group: Group, margin: float) -> float:
        trial = {**margins, group: margin}
        total = 0.0
        for cell, times in known[group]:
            problem, measured = problems[cell], cells[cell]
            scaled = {
                s: time * trial.get(cost_model.group(problem, s), 1.0) for s, time in times.items()
            }
            compared = cost_model.handicapped(problem, cell.active, scaled)
            chosen = min(compared, key=lambda s: compared[s])
            total += math.log(measured[chosen] / min(measured.values()))
            if regret.is_slower(problem, measured, chosen):
                total += _PENALTY
        return total

    for _ in range(2):
        for group in sorted(margins if among is None else margins.keys() & among):
            possible = [margin for margin in _MARGINS if margin >= low[group]]
            losses = {margin: loss(group, margin) for margin in possible}
            best = min(possible, key=lambda margin: (losses[margin], margin))
            worth = losses[possible[0]] - losses[best] >= _WORTH
            margins[group] = best if worth else possible[0]
    return margins


def path_of(name: str) -> Path:
    """Where the measurements of a class of machine are."""
    return wgrad_times.DATA / f"{name}.csv"


def classes() -> list[str]:
    """The classes of machines that were measured."""
    return sorted(path.stem for path in wgrad_times.DATA.glob("*.csv"))


def fit_class(name: str, measured_on: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a table file.

    Args:
        measured_on: the machine; None: the one that the shipped table names.
    """
    if measured_on is None:
        measured_on = json.loads((cost_model.COSTS / f"{name}.json").read_text())["measured_on"]
    costs = fit(wgrad_times.fastest(wgrad_times.read(path_of(name))))
    rounded = {
        dtype: {
            group: {key: float(f"{value:.5g}") for key, value in some.items()}
            for group, some in table.items()
        }
        for dtype, table in costs.items()
    }
    return {"measured_on": measured_on, "costs": rounded}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument(
        "records", nargs="*", type=Path, help="kernels.jsonl of this class of machine"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a figure falls short"
    )
    args = parser.parse_args(arguments)
    try:
        measured_on: dict[str, Any] = {}
        if args.records:
            machines = [load(path)[0]["machine"] for path in args.records]
            (name,) = {machine["cpu_class"] for machine in machines}
            runs = [cells for p in args.records for cells in wgrad_times.read_record(p).values()]
            wgrad_times.write(path_of(name), _by_number(runs))
            measured_on[name] = machines[-1]
        fitted = {name: fit_class(name, measured_on.get(name)) for name in classes()}
    except (OSError, ValueError, KeyError) as error:
        return cli.user_error(error)
    right = True
    for name, content in fitted.items():
        path, text = cost_model.COSTS / f"{name}.json", json.dumps(content, indent=1) + "\n"
        if not args.check:
            path.write_text(text)
        elif not path.exists() or not _agree(
            json.loads(path.read_text())["costs"], content["costs"]
        ):
            print(cli.red(f"{path.name} is not what {path_of(name).name} gives"))
            right = False
    return 0 if regret.show(classes(), fit, folds) and right else cli.WRONG_RESULT


def _by_number(runs: Sequence[Cells]) -> list[Cells]:
    """Runs of one dtype each are put together: the first of each, then the second of each."""
    by_dtype: dict[str, list[Cells]] = defaultdict(list)
    for cells in runs:
        by_dtype[next(iter(cells)).dtype].append(cells)
    together = itertools.zip_longest(*by_dtype.values(), fillvalue={})
    return [{**dict(itertools.chain(*(some.items() for some in group)))} for group in together]


def _agree(shipped: Any, fitted: Any) -> bool:
    """Whether two tables are the same but for the last digits of a solver."""
    if isinstance(shipped, Mapping) and isinstance(fitted, Mapping):
        return shipped.keys() == fitted.keys() and all(
            _agree(shipped[key], fitted[key]) for key in shipped
        )
    return math.isclose(shipped, fitted, rel_tol=1e-3)


if __name__ == "__main__":
    sys.exit(main())
