"""Fit the model of costs that chooses strategies to measurements of the kernel benchmark.

>>> python -m benchmarks.kernels.cpu --strategies --networks NAME ... tiny --out runs/strategies
>>> python -m benchmarks.kernels.fit_cost_model runs/strategies/kernels.jsonl

Without a record it fits again to the measurements of the last one, kept in ``results/fit.csv``.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import cli
from benchmarks.common.files import RESULTS
from benchmarks.common.records import Row, load
from benchmarks.kernels.goals import cell_of, geometric_mean
from benchmarks.kernels.layer_shapes import problems_by_cell
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch import cost_model

DATA = RESULTS / "fit.csv"
CELL = ("network", "layer", "layout", "active")
Cells = dict[tuple[object, ...], dict[Strategy, float]]

# Which features each strategy can depend on.
_READ = ("calls", "input", "active output", "output", "active weight", "weight")
FEATURES = {
    Strategy.DENSE: ("calls", "input", "output", "weight", "all products"),
    Strategy.PACK: (*_READ, "blocked products"),
    Strategy.CUSTOM: (*_READ, "products"),
}


def fit(cells: Cells) -> dict[str, dict[str, float]]:
    """Coefficients, none of them negative, that make the sum of squared relative errors least."""
    groups: dict[str, list[tuple[Strategy, dict[str, float], float]]] = defaultdict(list)
    problems = problems_by_cell()
    for cell, seconds in cells.items():
        problem, n = problems[cell[:3]], int(str(cell[3]))
        for strategy, measured in seconds.items():
            row = strategy, cost_model.features(problem, n), measured
            groups[cost_model.group(problem, strategy)].append(row)
    return {name: _least_squares(rows) for name, rows in sorted(groups.items())}


def _least_squares(rows: Sequence[tuple[Strategy, dict[str, float], float]]) -> dict[str, float]:
    strategy = rows[0][0]
    names = list(rows[0][1])
    free = [
        name
        for name in names
        if name in FEATURES[strategy] and any(features[name] for _, features, _ in rows)
    ]
    measured = np.array([seconds for *_, seconds in rows])
    while free:
        matrix = np.array([[features[name] for name in free] for _, features, _ in rows])
        scale = np.abs(matrix).max(axis=0)
        solution, *_ = np.linalg.lstsq(
            matrix / scale / measured[:, None], np.ones(len(rows)), rcond=None
        )
        solution = solution / scale
        if (solution >= 0).all():
            return {n: float(solution[free.index(n)]) if n in free else 0.0 for n in names}
        free.pop(int(solution.argmin() if (solution * scale < 0).any() else 0))
    return dict.fromkeys(names, 0.0)


def read_record(path: Path) -> Cells:
    """Median seconds by cell and strategy; of several runs of a cell, the fastest.

    Raises:
        FileNotFoundError, ValueError: no such record, or one without strategies.
    """
    cells: Cells = defaultdict(dict)
    for row in load(path)[1]:
        strategy = _strategy(row)
        if strategy is not None and "wrong" not in row:
            best = cells[cell_of(row)]
            best[strategy] = min(best.get(strategy, math.inf), row["seconds_median"])
    if not cells:
        raise ValueError(f"{path}: expected a record of benchmarks.kernels.cpu --strategies")
    return cells


def write_data(path: Path, cells: Cells) -> None:
    """Microseconds, one line for each cell."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*CELL, *(s.name.lower() for s in Strategy)])
        for cell, seconds in cells.items():
            times = (f"{seconds[s] * 1e6:.4g}" if s in seconds else "" for s in Strategy)
            writer.writerow([*cell, *times])


def read_data(path: Path) -> Cells:
    """What :func:`write_data` wrote."""
    with path.open(newline="") as file:
        return {
            (*(row[name] for name in CELL[:3]), int(row[CELL[3]])): {
                s: float(row[s.name.lower()]) / 1e6 for s in Strategy if row[s.name.lower()]
            }
            for row in csv.DictReader(file)
        }


def _strategy(row: Row) -> Strategy | None:
    provider = row.get("provider", "")
    name = provider.removeprefix("neq ").upper()
    return Strategy[name] if provider.startswith("neq ") and name in Strategy.__members__ else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("record", nargs="?", type=Path, help="kernels.jsonl, with --strategies")
    args = parser.parse_args(arguments)
    try:
        if args.record is not None:
            write_data(DATA, read_record(args.record))
            measured_on = load(args.record)[0]["machine"]
        else:
            measured_on = json.loads(cost_model.COSTS.read_text())["measured_on"]
        cells = read_data(DATA)
    except (OSError, ValueError, KeyError) as error:
        return cli.user_error(error)
    text = json.dumps({"measured_on": measured_on, "costs": fit(cells)}, indent=1)
    cost_model.COSTS.write_text(text + "\n")
    _show(cells)
    return 0


def _show(cells: Cells) -> None:
    """How much slower than the best strategy the chosen one is."""
    problems = problems_by_cell()
    regrets: dict[str, list[float]] = defaultdict(list)
    for cell, seconds in cells.items():
        problem, n = problems[cell[:3]], int(str(cell[3]))
        chosen = cost_model.strategy(problem, n, list(seconds))
        regret = seconds[chosen] / min(seconds.values())
        for name in (str(cell[2]), "all active" if n == problem.neurons else "fewer active"):
            regrets[name].append(regret)
    print(f"{'cells':<14} number  slower than the best: geomean  by 10 %  by 50 %")
    for name, values in regrets.items():
        over = [sum(v > limit for v in values) for limit in (1.1, 1.5)]
        print(
            f"{name:<14} {len(values):>6}  {geometric_mean(values):>30.3f}  {over[0]:>7}  "
            f"{over[1]:>7}"
        )


if __name__ == "__main__":
    sys.exit(main())
