"""What it costs that freed memory goes back to the system, with and without frozen neurons.

>>> python -m benchmarks.overheads.freed_memory --out runs/bench

Steps of processes that keep it and of processes that return it (the C library's default), several
of each, in turns.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.common import allocator, cli
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import WORKLOADS, Layout, loss, random_masks
from benchmarks.steps.comparison import DENSE, OPTIMIZERS, OURS
from neq_kernels.measure import Variant, step_time
from neq_kernels.measure.timing import Quantiles

MODELS: tuple[tuple[str, Layout], ...] = (
    ("mobilenet_v3_small", "nhwc"),
    ("vit_b_16", "nchw"),
)
QUICK: tuple[tuple[str, Layout], ...] = (("mlp", "any"),)
SHARE = 0.1
WARMUP = 2
COLUMNS = (
    ("model", -18),
    ("layout", -6),
    ("freed memory", -12),
    ("page faults", 11),
    ("dense ms", 8),
    ("neq ms", 8),
    ("speed-up", 8),
)


def steps(
    name: str, layout: Layout, freed: allocator.FreedMemory, threads: int, rounds: int
) -> list[tuple[float, float, float]]:
    """In a process of its own: seconds of dense steps and of ours, and page faults in a round."""
    torch.set_num_threads(threads)
    if freed == "kept":
        allocator.keep_freed_memory()
    workload, make = WORKLOADS[name], OPTIMIZERS["sgd"]
    built = {each.name: each.build(workload.model(layout), make) for each in (DENSE, OURS)}
    ours = built[OURS.name][0]
    OURS.masks(ours, random_masks(ours, SHARE), SHARE)
    variants = [Variant(name, model, loss, opt) for name, (model, opt) in built.items()]
    batches = workload.batches(layout)
    step_time(variants, batches, warmup=WARMUP, repeats=1)
    found = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times = step_time(variants, batches, warmup=0, repeats=1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        found.append((times[DENSE.name].total[0], times[OURS.name].total[0], float(faults)))
    return found


def measure(name: str, layout: Layout, processes: int, rounds: int) -> list[Row]:
    """A row for memory that is kept, and one for memory that is returned."""
    found: dict[allocator.FreedMemory, list[tuple[float, float, float]]] = {}
    for _ in range(processes):
        for freed in allocator.FREED_MEMORY:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                arguments = (name, layout, freed, torch.get_num_threads(), rounds)
                found.setdefault(freed, []).extend(pool.submit(steps, *arguments).result())
    rows = []
    for freed, samples in found.items():
        dense, ours, faults = zip(*samples, strict=True)
        speedups = [d / o for d, o, _ in samples]
        rows.append(
            {
                "model": name,
                "layout": layout,
                "r": SHARE,
                "freed_memory": freed,
                "page_faults_median": Quantiles.of(faults).median,
                "dense_seconds_median": Quantiles.of(dense).median,
                "neq_seconds_median": Quantiles.of(ours).median,
                "speedup_median": Quantiles.of(speedups).median,
                "rounds": len(samples),
            }
        )
    return rows


def show(table: cli.Table, row: Row) -> None:
    table.line(
        [
            row["model"],
            row["layout"],
            row["freed_memory"],
            f"{row['page_faults_median']:.0f}",
            f"{row['dense_seconds_median'] * 1e3:.1f}",
            f"{row['neq_seconds_median'] * 1e3:.1f}",
            f"{row['speedup_median']:.3f}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    given = parser.parse_args(arguments)
    cli.prepare(given)
    processes, rounds = (1, 3) if given.quick else (3, 4)
    settings = {"r": SHARE, "optimizer": "sgd", "processes": processes, "rounds": rounds}
    try:
        record = Record(given.out, "freed_memory", settings)
    except OSError as error:
        return cli.user_error(error)
    with record:
        table = cli.Table(COLUMNS)
        for name, layout in QUICK if given.quick else MODELS:
            for row in measure(name, layout, processes, rounds):
                record.add(row)
                show(table, row)
    print(record.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
