"""Every model people load: what converts, what is right, where backprop stops.

>>> python -m benchmarks.zoo                       # the list: models.txt; about an hour
>>> python -m benchmarks.zoo --only resnet18 gpt2  # names, families or libraries
>>> python -m benchmarks.zoo --publish             # docs/models.md, from the table

Each model runs in a process of its own, with random weights and a small input, in float64 where it
can. Compared with the dense model: the forward, bit by bit; with half of every layer's neurons
frozen, all gradients; one step of SGD (momentum, weight decay) and one of AdamW; the model after
``revert``. Counted below autograd, not asked of the library: the share of the products with a
parameter that belongs to neurons, and the input gradients that are left once the first half of the
layers is frozen, with ``others="follow"``, beside those that must be left.

Rows are written as they come, and those of this version are kept: an interrupted sweep goes on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.common import cli
from benchmarks.common.records import Row, load_csv, write_csv
from benchmarks.zoo import children, page, summary
from benchmarks.zoo.checks import CHECKS
from benchmarks.zoo.entries import LIBRARIES, Entry, chosen, entries
from neq_kernels.machine import machine
from neq_kernels.version import __version__

COLUMNS = (
    *("library", "section", "family", "name", "parameters", "dtype", "built", *CHECKS),
    *("mac_share", "dgrad", "dgrad_needed", "seconds", "version", "reason"),
)


class Sweep:
    """The table: rows by model, in the order of the list, on disk after each."""

    def __init__(self, path: Path, everything: Sequence[Entry]) -> None:
        self.path = path
        self._order = [entry.id for entry in everything]
        self._rows: dict[str, Row] = {}
        with suppress(FileNotFoundError):
            for row in load_csv(path)[1]:
                self._rows[f"{row['library']}/{row['name']}"] = row

    def rows(self, wanted: Sequence[Entry]) -> list[Row]:
        """Those of ``wanted`` that there are."""
        return [self._rows[entry.id] for entry in wanted if entry.id in self._rows]

    def has(self, entry: Entry) -> bool:
        """Whether this version was asked already."""
        return self._rows.get(entry.id, {}).get("version") == __version__

    def add(self, entry: Entry, answer: Row) -> Row:
        about = {name: getattr(entry, name) for name in ("library", "section", "family", "name")}
        known = about | {"version": __version__} | answer
        row = {
            name: round(known[name], 4) if isinstance(known[name], float) else known[name]
            for name in COLUMNS
            if known.get(name, "") not in ("", None)
        }
        self._rows[entry.id] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table = [self._rows[id] for id in self._order if id in self._rows]
        header = {"command": "python -m benchmarks.zoo", "machine": machine().to_dict()}
        write_csv(self.path, header, [{name: r.get(name, "") for name in COLUMNS} for r in table])
        return row


def run(wanted: Sequence[Entry], sweep: Sweep, jobs: int, limit: float) -> None:
    """Check, print and write each of them."""
    for library in LIBRARIES:  # once, not in every child
        if any(entry.library == library for entry in wanted):
            importlib.import_module(library)
    table = cli.Table([("model", -50), ("s", 5), ("MACs", 6), ("dgrad, needed", 13), ("", -1)])
    for entry, answer in children.rows(wanted, jobs, limit):
        row = sweep.add(entry, answer)
        words = str(row.get("reason", ""))
        table.line(
            [
                entry.id,
                f"{row['seconds']:.0f}",
                f"{row['mac_share']:.1%}" if "mac_share" in row else "",
                f"{row['dgrad']:.0%}, {row['dgrad_needed']:.0%}" if "dgrad" in row else "",
                cli.red(words) if summary.is_wrong(row) else words,
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models, families or libraries")
    parser.add_argument("--ci", action="store_true", help="the twelve that CI runs")
    parser.add_argument("--again", action="store_true", help="also what this version has done")
    parser.add_argument("--jobs", type=cli.positive, default=1, help="at a time (%(default)s)")
    parser.add_argument(
        "--seconds", type=cli.seconds, default=600.0, help="for one model (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=page.TABLE, help="the table (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="run nothing, write the page")
    given = parser.parse_args(arguments)
    try:
        everything = entries()
        wanted = chosen(given.only, given.ci, everything)
        if given.publish:
            page.publish(everything)
            return 0
        sweep = Sweep(given.out, everything)
        todo = [entry for entry in wanted if given.again or not sweep.has(entry)]
        run(todo, sweep, given.jobs, given.seconds)
    except (OSError, ValueError) as error:
        return cli.user_error(error)
    rows = sweep.rows(wanted)
    print("\n".join(summary.lines(rows)))
    return cli.WRONG_RESULT if any(map(summary.is_wrong, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
