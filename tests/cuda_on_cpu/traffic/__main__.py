"""What every CUDA C++ kernel moves, counted thread by thread on the CPU: no GPU is needed.

>>> python -m tests.cuda_on_cpu.traffic
>>> python -m tests.cuda_on_cpu.traffic --operations pack --out runs/bench
>>> python -m tests.cuda_on_cpu.traffic --publish    # the table of benchmarks/results

The operators of the CUDA backend run on the emulator of the tests, which lies in ``tests/``: from
the root of a checkout only. They cut the work as on an H100 of 132 multiprocessors. Most shapes
are small, because every access of every thread is looked at; a larger reduction gives each block
more rows, and what is moved beside the operands weighs less.

``moved``: the distinct 32-byte sectors of every request of a warp, without caches, but for the
``sums`` of a reduction in parts: one launch writes them, and the next one reads them while they are
in the GPU's L2. The shorter a reduction, the more they weigh: it is cut so that all multiprocessors
have work. ``least``: every sector of the operands that is needed read once, the result written once
(benchmarks/traffic_cases says of each operation which these are). ``indices``: the part of what is
moved that only says which neurons are active and where tensors lie; on a GPU almost all of it comes
from a cache. Bytes per request: what the lanes of a warp ask for together, 512 at most. An
operation fails that moves more than its gate times the least, sums and all (but for few rows of
short reductions), or whose result is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import cli
from benchmarks.common.files import RESULTS
from benchmarks.common.records import Record, Row
from tests.cuda_on_cpu.traffic import counted
from tests.cuda_on_cpu.traffic.operations import OPERATIONS, Case, cases

TABLE = RESULTS / "traffic.csv"
# Where their operands fit in an L2, what their sums in parts move is no part of the gate.
CUT_FOR_TIME = ("linear few rows", "conv few rows")
LARGER_THAN_L2 = 64 << 20
# The sums in parts have to stay in the L2 of every GPU that the kernels are made for.
MOST_SUMS_BYTES = 16 << 20
# What an operation may move, of the least; the others multiply tile by tile, and read their
# operands again for every tile.
GATES = {
    "pack": 1.1,
    "pack transposed": 1.1,
    "linear few rows": 1.15,
    "conv few rows": 1.15,
    "depthwise nhwc": 1.25,
    "depthwise nchw": 1.25,
}
COLUMNS = (
    ("operation", -15),
    ("dtype", -8),
    ("shape", -20),
    ("active", -10),
    ("moved, KB", 9),
    ("sums, KB", 8),
    ("least, KB", 9),
    ("ratio", 6),
    ("with sums", 9),
    ("gate", 4),
    ("indices", 7),
    ("requests", 8),
    ("bytes each", 10),
)


def rows(operations: Sequence[str]) -> Iterator[Row]:
    """One row per case of these operations."""
    return (row(case) for case in cases() if case.operation in operations)


def row(case: Case) -> Row:
    """What a case moves, and whether that is too much."""
    outcome = case.run(case)
    sums = sum(launch.sums_bytes for launch in outcome.launches)
    moved = sum(launch.bytes for launch in outcome.launches) - sums
    requests = sum(launch.requests for launch in outcome.launches)
    ratio, with_sums = (b / outcome.least_bytes for b in (moved, moved + sums))
    gate, is_short = GATES.get(case.operation), outcome.least_bytes < LARGER_THAN_L2
    fails = [] if outcome.is_right else ["wrong"]
    gated = ratio if case.operation in CUT_FOR_TIME and is_short else with_sums
    if gate is not None and gated > gate:
        fails.append("moves too much")
    if sums > 2 * MOST_SUMS_BYTES:  # written and read
        fails.append("sums leave L2")
    return {
        "operation": case.operation,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "active": case.active,
        "neurons": case.neurons,
        "inputs": case.inputs,
        "kernel": case.kernel,
        "side": case.side,
        "share": case.active / case.neurons,
        "moved_bytes": moved,
        "sums_bytes": sums,
        "least_bytes": outcome.least_bytes,
        "ratio": ratio,
        "ratio_with_sums": with_sums,
        "gate": "" if gate is None else gate,
        "index_bytes": sum(launch.index_bytes for launch in outcome.launches),
        "requests": requests,
        "bytes_per_request": sum(launch.asked_bytes for launch in outcome.launches) / requests,
        "launches": "; ".join(map(str, outcome.launches)),
        "fails": ", ".join(fails),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_on_cpu.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=OPERATIONS,
        default=list(OPERATIONS),
        metavar="OPERATION",
        help=", ".join(OPERATIONS),
    )
    parser.add_argument("--publish", action="store_true", help=f"copy the table to {TABLE.name}")
    given = parser.parse_args(arguments)
    reason = counted.unavailable()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return cli.USER_ERROR
    started = time.perf_counter()
    with Record(given.out, "traffic", {"operations": given.operations, **counted.H100}) as record:
        table = cli.Table(COLUMNS)
        for each in rows(given.operations):
            record.add(each)
            _print(table, each)
    if given.publish:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.path.with_suffix(".csv"), TABLE)
    failed = [each for each in record.rows if each["fails"]]
    seconds = time.perf_counter() - started
    print(f"{len(record.rows)} operations in {seconds:.0f} s, {len(failed)} fail")
    return cli.WRONG_RESULT if failed else 0


def _print(table: cli.Table, row: Row) -> None:
    table.line(
        [
            *(row[name] for name in ("operation", "dtype", "shape")),
            f"{row['active']} of {row['neurons']}",
            f"{row['moved_bytes'] / 1e3:.0f}",
            f"{row['sums_bytes'] / 1e3:.0f}",
            f"{row['least_bytes'] / 1e3:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_with_sums']:.3f}",
            f"{row['gate']}",
            f"{row['index_bytes'] / row['moved_bytes']:.1%}",
            f"{row['requests']}",
            f"{row['bytes_per_request']:.0f}",
        ],
        cli.red(row["fails"]),
    )


if __name__ == "__main__":
    sys.exit(main())
