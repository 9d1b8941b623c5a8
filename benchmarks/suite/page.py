"""The suite's block of ``docs/results.md``: the committed tables, as Markdown."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common.files import RESULTS
from benchmarks.common.markdown import table
from benchmarks.common.readme_block import Block
from benchmarks.common.records import Row, load, load_csv, write_csv
from benchmarks.kernels import goals
from benchmarks.steps.comparison import NO_WGRAD
from benchmarks.suite import figures

TABLES_AND_PICTURES = RESULTS / "suite"
BLOCK = Block("suite", "python -m benchmarks.suite --publish")
MEBI = 2**20


def published() -> str:
    """The block's text, from the committed tables: Markdown."""
    lines: list[str] = []
    for part in TABLES:
        path = TABLES_AND_PICTURES / f"{part}.csv"
        if path.exists():
            header, rows = load_csv(path)
            about = header["machine"]
            lines += [
                f"### {part}",
                "",
                f"`{header['command']}`, {about['date'][:10]}: {about['cpu']}, "
                f"{about['instructions']}, {about['threads']} threads, PyTorch {about['torch']}. "
                f"Every row: [{path.name}]({BLOCK.link(path)}).",
                "",
                *TABLES[part](rows),
                "",
            ]
    return "\n".join(lines)


def _mark(passes: bool | None) -> str:
    return "" if passes is None else ("ok" if passes else "**short**")


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    tuned = {each.target: each for each in goals.judge(rows, "neq tuned")}
    cells = []
    for each in goals.judge(rows):
        best = tuned.get(each.target)
        cells.append(
            [
                each.target.name,
                "worst cell" if each.target.worst else "geomean",
                f"{each.target.least:.2f}",
                f"{each.value:.2f} {_mark(each.passes)}",
                f"{each.below} of {each.cells}",
                "" if best is None else f"{best.value:.2f} {_mark(best.passes)}",
                "" if best is None else f"{best.below} of {best.cells}",
            ]
        )
    yield from table(
        ["target", "figure", "least", "neq", "cells below", "neq tuned", "cells below"], cells
    )
    yield ""
    yield "The worst cells against dense, in every run:"
    yield ""
    yield from _worst(rows)


def _worst(rows: Sequence[Row], count: int = 12) -> Iterator[str]:
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row["provider"] == "neq" and "over_dense_median" in row:
            cell = goals.cell_of(row)
            if cell not in best or best[cell]["over_dense_median"] < row["over_dense_median"]:
                best[cell] = row
    worst = sorted(best.values(), key=lambda row: row["over_dense_median"])[:count]
    yield from table(
        ["layer", "layout", "input", "weight", "active", "strategy", "µs", "over dense"],
        [
            [
                f"{row['network']} {row['layer']}",
                row["layout"],
                row["input"],
                row["weight"],
                f"{row['active']} of {row['channels']}",
                row["strategy"],
                f"{row['seconds_median'] * 1e6:.0f}",
                f"{row['over_dense_median']:.2f}",
            ]
            for row in worst
        ],
    )


def _step(rows: Sequence[Row]) -> Iterator[str]:
    speedups = {
        (r["provider"], r["model"], r["layout"], r["r"]): f"{r['speedup_median']:.3f}"
        for r in rows
        if "speedup_median" in r
    }
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["model"], row["layout"], f"{row['r']:g}", f"wrong: {row['error']}"])
            cells[-1] += [""] * 8
        elif row["provider"] == "neq":
            cell = (row["model"], row["layout"], row["r"])
            cells.append(
                [
                    row["model"],
                    row["layout"],
                    f"{row['r']:g}",
                    f"{row['total_seconds_median'] * 1e3:.1f}",
                    f"{row['speedup_median']:.3f}",
                    f"{row['speedup_p20']:.2f}–{row['speedup_p80']:.2f}",
                    speedups.get(("peer1", *cell), ""),
                    speedups.get((NO_WGRAD, *cell), ""),
                    f"{row['backward_speedup_median']:.3f}",
                    f"{row['bound']:.3f}",
                    f"{row['bound_floor']:.3f}",
                    f"{row['ratio_floor']:.3f} {_mark(row['passes_floor'])}",
                ]
            )
    yield from table(
        [
            "model", "layout", "r", "ms", "speed-up", "p20–p80", "peer 1", "no wgrad",
            "backward alone", "bound", "with floor", "of the bound with floor",
        ],
        cells,
    )  # fmt: skip


def _freed_memory(rows: Sequence[Row]) -> Iterator[str]:
    yield from table(
        ["model", "layout", "r", "freed memory", "page faults", "dense, ms", "neq, ms", "speed-up"],
        [
            [
                row["model"],
                row["layout"],
                f"{row['r']:g}",
                row["freed_memory"],
                f"{row['page_faults_median']:.0f}",
                f"{row['dense_seconds_median'] * 1e3:.1f}",
                f"{row['neq_seconds_median'] * 1e3:.1f}",
                f"{row['speedup_median']:.3f}",
            ]
            for row in rows
        ],
    )


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    yield from table(
        ["model", "frozen layers", "provider", "saved, MiB", "peak, MiB", "time / no_grad"],
        [
            [
                row["model"],
                f"{row['frozen_layers']} of {row['layers']}",
                row["provider"],
                f"{row['saved_bytes'] / MEBI:.1f} {_mark(row.get('passes_saved'))}",
                f"{row['peak_bytes'] / MEBI:.0f}" if "peak_bytes" in row else "",
                f"{row['time_ratio_median']:.3f} {_mark(row['passes_time'])}"
                if "passes_time" in row
                else "",
            ]
            for row in rows
        ],
    )


def _controller(rows: Sequence[Row]) -> Iterator[str]:
    yield from table(
        ["layout", "step, ms", "controller, ms", "share of an epoch", "memory over allowed"],
        [
            [
                row["layout"],
                f"{row['step_seconds_median'] * 1e3:.1f}",
                f"{row['controller_seconds_median'] * 1e3:.1f}",
                f"{row['share_of_epoch']:.3%} {_mark(row['passes_time'])}",
                f"{row['memory_ratio']:.2f} {_mark(row['passes_memory'])}",
            ]
            for row in rows
        ],
    )


def _overhead(rows: Sequence[Row]) -> Iterator[str]:
    yield from table(
        ["layer", "what", "µs, median", "p20–p80"],
        [
            [
                row["case"],
                row["what"],
                f"{row['seconds_median'] * 1e6:.1f} {_mark(row.get('passes'))}",
                f"{row['seconds_p20'] * 1e6:.1f}–{row['seconds_p80'] * 1e6:.1f}",
            ]
            for row in rows
        ],
    )


TABLES: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "kernels": _kernels,
    "step": _step,
    "freed_memory": _freed_memory,
    "memory": _memory,
    "controller": _controller,
    "overhead": _overhead,
}


def publish(folder: Path) -> None:
    """Copy the tables and pictures, and write the page.

    Raises:
        ValueError: a folder without records, or a page without the place for the tables.
    """
    names = [part for part in TABLES if (folder / f"{part}.jsonl").exists()]
    if not names:
        raise ValueError(f"{folder}: expected records of the suite, got none")
    BLOCK.text()
    TABLES_AND_PICTURES.mkdir(parents=True, exist_ok=True)
    for path in figures.draw(folder):
        shutil.copy(path, TABLES_AND_PICTURES / path.name)
    for name in names:
        write_csv(TABLES_AND_PICTURES / f"{name}.csv", *load(folder / f"{name}.jsonl"))
    BLOCK.write(published())
