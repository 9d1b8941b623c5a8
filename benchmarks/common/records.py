"""Rows of a benchmark on disk: JSON lines as they are measured, CSV when it is done."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common.allocator import freed_memory
from benchmarks.common.files import replace_file
from neq_kernels.machine import machine

Row = dict[str, Any]


class Record:
    """Writes ``NAME.jsonl`` line by line and ``NAME.csv`` at the end; both begin with what the
    figures were measured with.

    Args:
        folder: made if it is missing; an older record of the same name is overwritten.
        name: of the benchmark.
        settings: what it was run with.
        kept: header and rows of an earlier record that goes on in this one.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        settings: Mapping[str, Any],
        kept: tuple[Row, Sequence[Row]] | None = None,
    ) -> None:
        self.path = Path(folder) / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.header = {
            "benchmark": name,
            "command": _command() if kept is None else _and(kept[0]["command"], _command()),
            "settings": dict(settings),
            "machine": machine().to_dict() | {"freed_memory": freed_memory()},
        }
        self.rows: list[Row] = [] if kept is None else list(kept[1])
        self._file = self.path.open("w")
        for line in (self.header, *self.rows):
            self._write(line)

    def add(self, row: Row) -> None:
        """One result, on disk at once; of every figure four digits are kept."""
        row = {name: _rounded(value) for name, value in row.items()}
        self.rows.append(row)
        self._write(row)

    def arrange(self, key: Callable[[Row], Any]) -> None:
        """Put the rows, on disk too, in the order of ``key``."""
        self.rows.sort(key=key)
        lines = (json.dumps(line) + "\n" for line in (self.header, *self.rows))
        self._file.close()
        replace_file(self.path, "".join(lines).encode())
        self._file = self.path.open("a")

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
        write_csv(self.path.with_suffix(".csv"), self.header, self.rows)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _command() -> str:
    """What was run."""
    spec = sys.modules["__main__"].__spec__
    program = "python" if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    return " ".join([program, *sys.argv[0 if spec is None else 1 :]])


def _and(earlier: str, now: str) -> str:
    """Every command once."""
    return " && ".join(dict.fromkeys([*earlier.split(" && "), now]))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def facts(machine: Mapping[str, Any]) -> str:
    """One line about the machine and the versions."""
    m = machine
    return (
        f"{m['date']} · {m['cpu']}, {m['cores']} cores, {m['threads']} PyTorch threads, "
        f"{m['instructions']}, {m['accelerator'] or 'no accelerator'} · {m['system']} · "
        f"Python {m['python']} · PyTorch {m['torch']}"
    )


def load(path: str | Path) -> tuple[Row, list[Row]]:
    """Header and rows of a ``.jsonl`` record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no record.
    """
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line]
    if not lines or "benchmark" not in lines[0]:
        raise ValueError(f"{path}: expected a record of a benchmark")
    return lines[0], lines[1:]


def load_csv(path: Path) -> tuple[Row, list[Row]]:
    """Command and machine, and the rows of a table that :func:`write_csv` wrote; what is empty in a
    row is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not begin as such a table does.
    """
    with path.open(newline="") as file:
        first = file.readline()
        if not first.startswith("# command: "):
            raise ValueError(f"{path}: expected a first line '# command: ...', got {first!r}")
        pairs = re.split(r"; (?=\w+: )", first.strip().removeprefix("# "))
        about = dict(pair.split(": ", 1) for pair in pairs)
        rows = [
            {name: _value(text) for name, text in row.items() if text != ""}
            for row in csv.DictReader(file)
        ]
    return {"command": about.pop("command"), "machine": about}, rows


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text


def write_csv(path: Path, header: Row, rows: Sequence[Row]) -> None:
    """The rows as a table below a comment line with the command and the machine."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        about = {"command": header["command"], **header["machine"]}
        file.write("# " + "; ".join(f"{key}: {value}" for key, value in about.items()) + "\n")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
