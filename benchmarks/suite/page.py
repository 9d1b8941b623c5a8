"""The suite's block of ``docs/results.md``: the committed tables of every class of CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common import by_class
from benchmarks.common.files import RESULTS
from benchmarks.common.markdown import table
from benchmarks.common.readme_block import Block
from benchmarks.common.records import Row, load, load_csv, write_csv
from benchmarks.kernels import goals, wgrad_times
from benchmarks.steps import account
from benchmarks.steps import goals as step_goals
from benchmarks.steps.comparison import NO_WGRAD
from benchmarks.suite import figures, strategy_map, summary

SUITE = RESULTS / "suite"
BLOCK = Block("suite", "python -m benchmarks.suite --publish")
MEBI = 2**20
PICTURES = {
    "kernel_speedups.png": "Speed-up of the weight gradient against the share of active channels",
    "step_speedups.png": "Speed-up of whole steps against the share of active channels, with bound",
    "roofline.png": "Roofline",
    "strategies.png": "Strategy chosen for every layer",
}
SHOWN = ("kernel_speedups.png", "step_speedups.png")


def published() -> str:
    """The block's text, from the committed tables: Markdown.

    Raises:
        ValueError: a table in the folder of another class than its machine's.
    """
    lines = ["### Side by side", "", *summary.lines(), "", *_strategy_map()]
    for name, folder in by_class.folders(SUITE).items():
        lines += [f"### {name}", "", *_pictures(folder)]
        for part in TABLES:
            if (folder / f"{part}.csv").exists():
                lines += _section(part, folder / f"{part}.csv", name)
    return "\n".join(lines)


def _strategy_map() -> Iterator[str]:
    path = wgrad_times.DATA / strategy_map.PICTURE
    if path.exists():
        yield from (f"![What each strategy is chosen for, by class]({BLOCK.link(path)})", "")


def _pictures(folder: Path) -> Iterator[str]:
    links = {name: BLOCK.link(folder / name) for name in PICTURES if (folder / name).exists()}
    for name in SHOWN:
        if name in links:
            yield from (f"![{PICTURES[name]}]({links[name]})", "")
    more = [f"[{PICTURES[n].lower()}]({link})" for n, link in links.items() if n not in SHOWN]
    if more:
        yield from (f"More pictures: {', '.join(more)}.", "")


def _section(part: str, path: Path, cpu_class: str) -> Iterator[str]:
    header, rows = load_csv(path)
    about = header["machine"]
    by_class.check(about, cpu_class, path)
    yield from (
        f"#### {part}, {cpu_class}",
        "",
        f"`{header['command']}`, {about['date'][:10]}: {about['cpu']}, "
        f"{about['instructions']}, {about['threads']} threads, PyTorch {about['torch']}. "
        f"Every row: [{path.name}]({BLOCK.link(path)}).",
        "",
        *TABLES[part](rows),
        "",
    )
    if part == "step":
        yield from _red_cells(rows, path.parent)


def _red_cells(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    for judged in step_goals.judge(rows):
        yield f"- {judged.goal}: {judged.figure} {_mark(judged.passes)}"
    yield ""
    red = [row for row in step_goals.ours(rows) if step_goals.short_of(row)]
    if red:
        yield f"Red cells, {len(red)} of {len(step_goals.ours(rows))}, with the account of each:"
        yield ""
    for row in red:
        path = folder / f"{account.name_of(*step_goals.cell_of(row))}.csv"
        where = f"[account]({BLOCK.link(path)})" if path.exists() else "no account"
        yield f"- {step_goals.name_of(row)}: {', '.join(step_goals.short_of(row))}; {where}"
    yield ""


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
        (row["provider"], step_goals.cell_of(row)): f"{row['speedup_median']:.3f}"
        for row in rows
        if "speedup_median" in row
    }
    cells = []
    for row in rows:
        about = [row["model"], row["layout"], step_goals.dtype_of(row), f"{row['r']:g}"]
        if "error" in row:
            cells.append([*about, f"wrong: {row['error']}", *[""] * 8])
        elif row["provider"] == "neq":
            cell = step_goals.cell_of(row)
            cells.append(
                [
                    *about,
                    f"{row['total_seconds_median'] * 1e3:.1f}",
                    f"{row['speedup_median']:.3f}",
                    f"{_interval(row)}{' (wide)' if row.get('wide') else ''}",
                    speedups.get(("peer1", cell), ""),
                    speedups.get((NO_WGRAD, cell), ""),
                    f"{row['backward_speedup_median']:.3f}",
                    f"{row['bound']:.3f}",
                    f"{row['bound_floor']:.3f}",
                    f"{row['ratio_floor']:.3f} {_mark(not step_goals.short_of(row))}",
                ]
            )
    yield from table(
        [
            "model", "layout", "dtype", "r", "ms", "speed-up", "95 %", "peer 1", "no wgrad",
            "backward alone", "bound", "with floor", "of the bound with floor",
        ],
        cells,
    )  # fmt: skip
    yield ""


def _interval(row: Row) -> str:
    """Of few rounds only the quantiles are known."""
    if "speedup_low" in row:
        return f"{row['speedup_low']:.3f}–{row['speedup_high']:.3f}"
    return f"p20–p80: {row['speedup_p20']:.2f}–{row['speedup_p80']:.2f}"


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


def publish(run: Path) -> None:
    """Copy the tables and pictures of a run on a machine of this class to its class's folder, and
    write the page, of every class.

    Raises:
        ValueError: a folder without records, one of another class of machine, or a page without the
            place for the tables.
    """
    records = [path for part in TABLES if (path := run / f"{part}.jsonl").exists()]
    accounts = sorted(run.glob("account_*.jsonl"))
    if not records:
        raise ValueError(f"{run}: expected records of the suite, got none")
    BLOCK.text()
    loaded = {path: load(path) for path in (*records, *accounts)}
    for path, (header, _) in loaded.items():
        folder = by_class.own_folder(SUITE, header["machine"], path)
    for path in figures.draw(run):
        shutil.copy(path, folder / path.name)
    for path, (header, rows) in loaded.items():
        write_csv(folder / f"{path.stem}.csv", header, rows)
    strategy_map.draw()
    BLOCK.write(published())
