"""Compare runs, or show one: plots, ``summary.csv`` and ``report.html`` from their files.

python -m benchmarks.training.report runs/dense runs/neq --out runs/comparison
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import cli
from benchmarks.training.report.report import Scene, describe_settings, write_comparison
from benchmarks.training.report.results import Result
from benchmarks.training.run_folder import RunError, RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders that benchmarks.training.train wrote"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the comparison")
    given = parser.parse_args(arguments)
    try:
        results = [Result.read(RunFolder(path), path.name) for path in given.runs]
        given.out.mkdir(parents=True, exist_ok=True)
        scene = Scene("Runs", describe_settings(results[0].settings), results)
        write_comparison(given.out, "Comparison of runs", "", [scene])
    except (RunError, OSError) as error:
        return cli.user_error(error)
    print(given.out / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
