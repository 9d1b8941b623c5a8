"""Whole training steps: dense, peer 1 and neq_kernels, beside the most that the masks can save.

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

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common import cli
from benchmarks.common.records import Record
from benchmarks.common.workloads import WORKLOADS, Layout, Workload
from benchmarks.steps.comparison import (
    COLUMNS,
    OPTIMIZERS,
    TARGET_OF_BOUND,
    TARGET_OF_DENSE,
    StepOptions,
    cells,
    rows,
)
from neq_kernels.optim import step_check

SHARES_OF_CHANNELS = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)
QUICK = (("resnet32", "nhwc"), ("mlp", "any"))
QUICK_SHARES = (0.5, 0.0)
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")


def run(workloads: Sequence[tuple[Workload, Layout]], options: StepOptions, record: Record) -> bool:
    """Measure, print and write every cell; whether every result was right."""
    table = cli.Table(COLUMNS)
    right = True
    for workload, layout in workloads:
        for row in rows(workload, layout, options):
            right &= "error" not in row
            record.add(row)
            table.line(*cells(row))
        gc.collect()
    return right


def chosen_workloads(
    names: Sequence[str] | None, layouts: Sequence[Layout] | None, quick: bool
) -> list[tuple[Workload, Layout]]:
    """By name and layout; a network that knows one layout only is in whatever is asked."""
    if quick and names is None and layouts is None:
        return [(WORKLOADS[name], layout) for name, layout in QUICK]
    return [
        (WORKLOADS[name], layout)
        for name in names or WORKLOADS
        for layout in WORKLOADS[name].layouts
        if len(WORKLOADS[name].layouts) == 1 or layout in (layouts or LAYOUTS)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    parser.add_argument(
        "--models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument("--r", nargs="+", type=cli.share, help="shares of active channels")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--seconds", type=cli.seconds, help="for each cell (default: 4, quick: 2)")
    given = parser.parse_args(arguments)
    cli.prepare(given)
    options = StepOptions(
        shares=tuple(given.r or (QUICK_SHARES if given.quick else SHARES_OF_CHANNELS)),
        optimizer=given.optimizer,
        seconds=given.seconds or (2.0 if given.quick else 4.0),
        rounds_of_shares=5 if given.quick else 7,
    )
    workloads = chosen_workloads(given.models, given.layouts, given.quick)
    settings: dict[str, Any] = asdict(options) | {
        "workloads": [[workload.name, layout] for workload, layout in workloads],
        "targets": {"of the bound": TARGET_OF_BOUND, "of dense at r = 1": TARGET_OF_DENSE},
    }
    try:
        record = Record(given.out, "step", settings)
    except OSError as error:
        return cli.user_error(error)
    with record:
        right = run(workloads, options, record)
    print(record.path)
    return 0 if right else cli.WRONG_RESULT


if __name__ == "__main__":
    os.environ.setdefault(step_check.VARIABLE, "1")
    sys.exit(main())
