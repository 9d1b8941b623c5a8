"""Whole training steps: dense and neq_kernels, beside the most that the masks can save.

>>> python -m benchmarks.steps.cpu --out runs/bench                   # everything; goes on where
>>> python -m benchmarks.steps.cpu --models mlp --r 1 .5 --again      # it was interrupted
>>> python -m benchmarks.steps.cpu --account resnet50 nhwc 0.1        # where a cell's time goes

Every layer, norm layers too, has the share ``r`` of its channels active, chosen at random; with
``r = 0`` the output layer is active, everything else frozen, and backprop stops at the output.
Dropout and stochastic depth are off. Nothing is timed before the results are compared.

The bound's phases, and what all weight gradients take together, are measured in turns with the
rest: ``no wgrad`` is the dense model whose convolutions and linear layers learn nothing, though
backprop passes them. How the weight gradients divide among the layers is measured once.

The bound takes the forward as measured. With ``r = 0`` the forward saves nothing and may itself be
faster, so a ratio above 1 is no error there.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import cli
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import (
    BF16_WORKLOADS,
    WORKLOADS,
    Layout,
    Workload,
    computes_bfloat16,
)
from benchmarks.steps import account, goals, resume
from benchmarks.steps.certainty import WIDEST
from benchmarks.steps.comparison import (
    COLUMNS,
    DENSE,
    OPTIMIZERS,
    OURS,
    PEER,
    Contest,
    Provider,
    StepOptions,
    cells,
)
from neq_kernels.optim import step_check

SHARES_OF_CHANNELS = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)
QUICK = (("resnet32", "nhwc"), ("mlp", "any"))
QUICK_SHARES = (0.5, 0.0)
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
DTYPES = ("float32", "bfloat16")
LEAST_ROUNDS = 15


class Cell(NamedTuple):
    """What one speed-up is measured of."""

    workload: Workload
    layout: Layout
    r: float

    @property
    def key(self) -> tuple[str, str, str, float]:
        """As :func:`goals.cell_of` gives it."""
        return self.workload.name, self.layout, self.workload.dtype, self.r


def run(
    wanted: Sequence[Cell], providers: Sequence[Provider], options: StepOptions, record: Record
) -> bool:
    """Measure, print and write every cell; whether every result was right."""
    table = cli.Table(COLUMNS)
    right = True
    contest, contest_of = None, None
    for cell in wanted:
        if contest is None or contest_of != (cell.workload, cell.layout):
            contest = None
            gc.collect()
            contest = Contest(cell.workload, cell.layout, options, providers)
            contest_of = (cell.workload, cell.layout)
        for row in contest.rows(cell.r):
            right &= "error" not in row
            record.add(row)
            table.line(*cells(row))
    return right


def chosen_cells(
    names: Sequence[str] | None = None,
    layouts: Sequence[Layout] | None = None,
    dtypes: Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
    quick: bool = False,
) -> list[Cell]:
    """By model, layout, dtype and share of active channels; None: all, bfloat16 where the CPU
    computes in it. A network that knows one layout only is in whatever is asked."""
    if dtypes is None:
        dtypes = DTYPES if computes_bfloat16() and not quick else DTYPES[:1]
    workloads = [*WORKLOADS.values(), *BF16_WORKLOADS.values()]
    found = [
        (workload, layout)
        for workload in workloads
        if workload.dtype in dtypes and workload.name in (names or WORKLOADS)
        for layout in workload.layouts
        if layout not in LAYOUTS or layout in (layouts or LAYOUTS) or len(workload.layouts) == 1
    ]
    if quick and names is None and layouts is None:
        found = [(w, layout) for w, layout in found if (w.name, layout) in QUICK]
    shares = shares or (QUICK_SHARES if quick else SHARES_OF_CHANNELS)
    return [Cell(workload, layout, r) for workload, layout in found for r in shares]


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    cli.prepare(given)
    options = StepOptions(
        optimizer=given.optimizer,
        seconds=given.seconds or (2.0 if given.quick else 4.0),
        rounds_of_shares=5 if given.quick else 7,
        least_rounds=given.rounds,
        again=not given.quick,
    )
    try:
        if given.account:
            cell = _one_cell(given.account)
            print("\n".join(account.write(given.out, cell.workload, cell.layout, cell.r, options)))
            return 0
        wanted = chosen_cells(given.models, given.layouts, given.dtypes, given.r, given.quick)
        return measure(wanted, options, given)
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        return cli.user_error(error)


def measure(wanted: Sequence[Cell], options: StepOptions, given: argparse.Namespace) -> int:
    """What is wanted and not yet in the record, and the verdict on all of it."""
    providers = (DENSE, PEER, OURS) if given.peer else (DENSE, OURS)
    settings: dict[str, Any] = asdict(options) | {
        "providers": [provider.name for provider in providers],
        "code": resume.code(),
        "environment": resume.environment(),
    }
    kept = _kept(given.out / "step.jsonl", settings, wanted if given.again else ())
    done = set() if kept is None else {goals.cell_of(row) for row in kept[1]}
    left = [cell for cell in wanted if cell.key not in done]
    if done and not left:
        print("nothing left to measure; --again measures it again")
    settings["cells"] = [list(cell.key) for cell in wanted]
    with Record(given.out, "step", settings, kept) as record:
        right = run(left, providers, options, record)
        order = {cell.key: i for i, cell in enumerate(chosen_cells(dtypes=DTYPES))}
        record.arrange(lambda row: order.get(goals.cell_of(row), len(order)))
    print("\n".join(goals.summary(record.rows)))
    print(record.path)
    return 0 if right else cli.WRONG_RESULT


def _kept(
    path: Path, settings: dict[str, Any], again: Sequence[Cell]
) -> tuple[Row, list[Row]] | None:
    try:
        found = resume.earlier(path, settings)
    except ValueError as error:
        print(f"{path}: begun anew, what was there is of another kind ({error})")
        return None
    if found is None:
        return None
    header, rows = found
    measured_again = {cell.key for cell in again}
    rows = [row for row in rows if goals.cell_of(row) not in measured_again]
    print(f"{path}: {len({goals.cell_of(row) for row in rows})} cells kept")
    return header, rows


def _one_cell(words: Sequence[str]) -> Cell:
    every = {cell.key[:3]: cell for cell in chosen_cells(dtypes=DTYPES)}
    model, layout, r, dtype = (*words, DTYPES[0])[:4] if len(words) in (3, 4) else [""] * 4
    if (model, layout, dtype) not in every:
        raise ValueError(
            "--account: expected a model, its layout, a share of active channels, and bfloat16 if "
            f"not float32; got {' '.join(words)}"
        )
    return every[model, layout, dtype]._replace(r=cli.share(r))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    parser.add_argument(
        "--models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        help="default: bfloat16 too if the CPU computes in it",
    )
    parser.add_argument("--r", nargs="+", type=cli.share, help="shares of active channels")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--peer", action="store_true", help="peer 1 too")
    parser.add_argument("--seconds", type=cli.seconds, help="for each cell (default: 4, quick: 2)")
    parser.add_argument(
        "--rounds",
        type=cli.positive,
        default=LEAST_ROUNDS,
        help=f"at least so many (%(default)s), and more for intervals above {100 * WIDEST:g} %%",
    )
    parser.add_argument(
        "--again", action="store_true", help="what the record in --out holds already, too"
    )
    parser.add_argument(
        "--account",
        nargs="+",
        metavar=("MODEL LAYOUT R", "DTYPE"),
        help="of one cell: bytes, floor and microseconds of every layer",
    )
    return parser


if __name__ == "__main__":
    os.environ.setdefault(step_check.VARIABLE, "1")
    sys.exit(main())
