"""The whole suite, one benchmark after the other, and its block of the page of results.

>>> python -m benchmarks.suite --out runs/bench              # an hour or two; --quick: minutes
>>> python -m benchmarks.suite --out runs/bench --publish    # only the page, from a finished run

``--publish`` copies tables and pictures to the folder of this machine's class of CPU in
``benchmarks/results/suite`` and writes ``docs/results.md``, of every class, from these copies, so
that every figure there has a committed source.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import cli
from benchmarks.suite import figures, page

PARTS = {
    "kernels": "benchmarks.kernels.cpu",
    "step": "benchmarks.steps.cpu",
    "freed_memory": "benchmarks.overheads.freed_memory",
    "memory": "benchmarks.overheads.memory",
    "controller": "benchmarks.overheads.controller",
    "overhead": "benchmarks.overheads.overhead",
}
MORE_ARGUMENTS = {"kernels": ["--tuned"]}


def run(parts: Sequence[str], out: Path, quick: bool) -> int:
    """Each benchmark in a process of its own; the first exit status that is not 0."""
    status = 0
    for part in parts:
        command = [sys.executable, "-m", PARTS[part], "--out", str(out)]
        command += ["--quick"] if quick else MORE_ARGUMENTS.get(part, [])
        print(f"\n== {part}", flush=True)
        status = status or subprocess.run(command, check=False).returncode
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few small cases, in minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--publish", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args(arguments)
    try:
        if args.publish:
            page.publish(args.out)
            return 0
        status = run(args.parts, args.out, args.quick)
        print("\n".join(map(str, figures.draw(args.out))))
    except (OSError, ValueError) as error:
        return cli.user_error(error)
    return status


if __name__ == "__main__":
    sys.exit(main())
