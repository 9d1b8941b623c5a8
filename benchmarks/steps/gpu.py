"""Whole training steps on a GPU, under bfloat16 autocast: dense, peer 1 and ours, with the bound.

>>> python -m benchmarks.steps.gpu --seconds 160 --out runs/gpu

The models compete by each of our backends in turn. The device waits at both ends of every phase of
a step, as on the CPU: what the host does is not hidden behind the phase before.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.common import cli, gpu_device
from benchmarks.common.deadline import Deadline
from benchmarks.common.gpu_device import OUT_OF_MEMORY, DeviceLost, Lab
from benchmarks.common.interrupt import Interrupted, Interruptible
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import GPU_WORKLOADS, Workload
from benchmarks.steps import comparison
from neq_kernels.dispatch.selection import selector
from neq_kernels.optim import step_check

NAME = "gpu_steps"
SHARES = (1.0, 0.5, 0.25, 0.1, 0.02)
COLUMNS = (("backend", -7), *comparison.COLUMNS)


@dataclass(frozen=True)
class GpuStepOptions:
    """``seconds`` for each cell; backends in ``failed`` are not timed."""

    shares: tuple[float, ...] = SHARES
    seconds: float = 1.5
    rounds_of_shares: int = 5
    least_rounds: int = 7
    optimizer: str = "sgd"
    failed: tuple[str, ...] = ()


def backends(lab: Lab) -> tuple[str, ...]:
    """Those that are measured; the last one is the default on a GPU."""
    return tuple(dict.fromkeys((lab.backend, *lab.others)))


def measure(
    workload: Workload,
    backend: str,
    options: GpuStepOptions,
    lab: Lab,
    deadline: Deadline,
    check: Callable[[], None],
) -> Iterator[Row]:
    """Rows of one model, provider by provider and share by share."""
    layout = workload.layouts[0]
    about = {"model": workload.name, "layout": layout, "backend": backend}
    if backend in options.failed:
        yield about | {"error": f"not timed: tests of {backend} failed"}
        return
    # The peer is the same whatever our backend.
    only = None if backend == lab.backend else (comparison.DENSE, comparison.OURS)
    told = comparison.StepOptions(
        options.optimizer, options.seconds, options.rounds_of_shares, options.least_rounds
    )
    contest = None
    for r in options.shares:
        check()
        if deadline.passed:
            yield about | {"r": r, "left_out": True}
            continue
        try:
            contest = contest or comparison.Contest(workload, layout, told, only)
            yield from (about | row for row in contest.rows(r))
        except DeviceLost:
            raise
        except Exception as failure:  # a model that does not fit is no reason to lose the others
            yield about | {"r": r, "error": lab.survived(failure)}
            return


def run(
    workloads: Sequence[Workload],
    options: GpuStepOptions,
    lab: Lab,
    deadline: Deadline,
    record: Record,
) -> bool:
    """Measure, print and write every cell; whether every gradient was right."""
    table = cli.Table(COLUMNS)
    right = True
    with Interruptible() as stop:
        for backend in backends(lab):
            with selector.forced_backend(backend):
                for workload in workloads:
                    for row in measure(workload, backend, options, lab, deadline, stop.check):
                        record.add(row)
                        right &= row.get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY
                        _show(table, row)
                    gc.collect()
                    lab.free()
    return right


def _show(table: cli.Table, row: Row) -> None:
    if "total_seconds_median" in row:
        cells, verdict = comparison.cells(row)
    else:
        names = ("model", "layout", "dtype", "r", "provider")
        head = [str(row.get(name, "")) for name in names]
        cells = [*head, *[""] * (len(comparison.COLUMNS) - len(head))]
        verdict = "no time left" if "left_out" in row else cli.red(row["error"])
    table.line([row["backend"], *cells], verdict)


def main(arguments: Sequence[str] | None = None) -> int:
    given = gpu_device.phase_parser(__spec__, __doc__, 160.0).parse_args(arguments)
    deadline = Deadline.after(given.seconds)
    if not gpu_device.found():
        return gpu_device.nothing_measured()
    lab = Lab.on_gpu()
    options = GpuStepOptions(failed=tuple(given.failed))
    try:
        with Record(given.out, NAME, asdict(options)) as record:
            right = run(GPU_WORKLOADS, options, lab, deadline, record)
    except (OSError, Interrupted, DeviceLost) as error:
        return gpu_device.exit_code(NAME, error)
    return 0 if right else cli.WRONG_RESULT


if __name__ == "__main__":
    os.environ.setdefault(step_check.VARIABLE, "1")
    sys.exit(main())
