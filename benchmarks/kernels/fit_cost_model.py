"""Fit the tables of costs that strategies are chosen by, one for each class of machine.

>>> python -m benchmarks.kernels.cpu --strategies --networks NAME ... tiny --out runs/strategies
>>> python -m benchmarks.kernels.fit_cost_model runs/strategies/kernels.jsonl  # of this machine
>>> python -m benchmarks.kernels.fit_cost_model          # every class again, from results/costs
>>> python -m benchmarks.kernels.fit_cost_model --check  # are the shipped tables these, and good?

A time is linear in what is read, written and multiplied, with coefficients for each kind of layer
and layout, none of them negative; the least of them are left out until ``MOST`` are left. These are
then moved, as little as need be, to where the choices cost least: a time matters as far as a choice
depends on it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from benchmarks.common import cli
from benchmarks.common.records import load
from benchmarks.kernels import regret, wgrad_times
from benchmarks.kernels.wgrad_times import Cells
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch import cost_model
from neq_kernels.dispatch.cost_model import CostModel

# Coefficients of one strategy, for one dtype on one class of machine.
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
# What one cell counts, beside logarithms of times, that is not faster than PyTorch's kernel by at
# least so much; and what the error of a predicted time counts.
_PENALTY, _WORTH, _TIMES = 2.0, 1.03, 0.05
# By what two predictions may differ, in logarithms, and still be both chosen.
_SOFTNESS = 0.1
# What a coefficient is multiplied or divided by at most.
_MOVED = 2.0
# So that every machine's solver ends at the same coefficients.
_TO_THE_END = {"ftol": 1e-13, "gtol": 1e-9, "maxiter": 20_000, "maxfun": 40_000}

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
    return {dtype: _for_choices(some, _for_times(some)) for dtype, some in by_dtype.items()}


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


def _for_times(cells: Cells) -> Table:
    """Coefficients whose predictions are close to the times measured."""
    problems = wgrad_times.problems_of(cells)
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
            if group.startswith(f"{strategy.name.lower()} ")
        }
        table |= _with_the_best(fits, MOST)
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


def _for_choices(cells: Cells, table: Table) -> Table:
    """The same coefficients, moved until choosing by them costs least. A choice is a matter of
    degree here: the closer two predictions, the more evenly each is taken to be chosen."""
    problems = wgrad_times.problems_of(cells)
    names = [(group, name) for group, costs in table.items() for name in costs]
    where = {at: i for i, at in enumerate(names)}
    shape = len(cells), len(Strategy)
    values = torch.zeros(*shape, len(where), dtype=torch.float64)
    measured, handicap, loss = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    competes = torch.zeros(shape, dtype=torch.bool)
    for i, (cell, seconds) in enumerate(cells.items()):
        problem = problems[cell]
        features = cost_model.features(problem, cell.active)
        factors = cost_model.handicapped(problem, cell.active, dict.fromkeys(seconds, 1.0))
        for strategy, time in seconds.items():
            at, group = (i, list(Strategy).index(strategy)), cost_model.group(problem, strategy)
            for name in table[group]:
                values[*at, where[group, name]] = features[name]
            measured[at] = math.log(time)
            loss[at] = math.log(time / min(seconds.values()))
            if strategy != Strategy.DENSE and regret.is_large(problem):
                loss[at] += _PENALTY * (_WORTH * time > seconds[Strategy.DENSE])
            if strategy in factors:
                competes[at], handicap[at] = True, math.log(factors[strategy])
    known = values.sum(-1) > 0

    def total(logs: Tensor) -> Tensor:
        times = torch.where(known, values @ logs.exp(), 1.0).log()
        lead = torch.where(competes, -(times + handicap) / _SOFTNESS, -math.inf)
        off = torch.where(known, times - measured, 0.0)
        return (lead.softmax(1) * loss).sum() + _TIMES * (off**2 + _NOISE**2).sqrt().sum()

    logs = np.log([table[g][name] for g, name in names])
    limits = [(log - math.log(_MOVED), log + math.log(_MOVED)) for log in logs]
    found = np.exp(_minimum(total, logs, limits)).tolist()
    return {g: {name: found[where[g, name]] for name in table[g]} for g in sorted(table)}


def _minimum(
    function: Callable[[Tensor], Tensor], start: np.ndarray, limits: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Where a function is least, near ``start`` and within limits."""

    def value_and_gradient(numbers: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(numbers, requires_grad=True)
        value = function(at)
        value.backward()
        return value.item(), at.grad.numpy()

    found = minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=limits, options=_TO_THE_END
    )
    return found.x


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
    costs = fit(wgrad_times.typical(wgrad_times.read(path_of(name))))
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
        elif not _agree(CostModel.of_class(name).coefficients, content["costs"]):
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
