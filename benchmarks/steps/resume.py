"""A record of steps that goes on where an earlier run was interrupted, or was asked for less."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import neq_kernels
from benchmarks.common.allocator import freed_memory
from benchmarks.common.records import Row
from benchmarks.steps.comparison import NO_WGRAD
from benchmarks.steps.goals import cell_of
from neq_kernels.machine import machine

CODE = (".py", ".so", ".json")
# In what the runs of one record may differ.
FREE = ("cells", "date")


def code() -> str:
    """What identifies the installed package's code."""
    folder = Path(neq_kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in CODE):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, str]:
    """The variables that the package reads."""
    return {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith("NEQ_KERNELS_")
    }


def earlier(path: Path, settings: Mapping[str, Any]) -> tuple[Row, list[Row]] | None:
    """Header and rows of a record, without the cell in which it was interrupted; None without one.

    Raises:
        ValueError: one that was measured in another way, of other code or on another machine.
    """
    if not path.exists():
        return None
    lines: list[Row] = []
    with suppress(json.JSONDecodeError):  # the last line of a process that was killed
        lines.extend(map(json.loads, path.read_text().splitlines()))
    if not lines or "benchmark" not in lines[0]:
        raise ValueError("no record of a benchmark")
    header, *rows = lines
    here = machine().to_dict() | {"freed_memory": freed_memory()}
    now = json.loads(json.dumps({**here, **settings}))
    before = {**header["machine"], **header["settings"]}
    differs = [
        f"{name}: {before.get(name)}, now {now[name]}"
        for name in now
        if name not in FREE and before.get(name) != now[name]
    ]
    if differs:
        raise ValueError("; ".join(differs))
    return header, finished(rows)


def finished(rows: Sequence[Row]) -> list[Row]:
    """Rows of cells that were measured to the end: what was wrong is measured again."""
    done = {cell_of(row) for row in rows if row["provider"] == NO_WGRAD}
    return [row for row in rows if cell_of(row) in done]
