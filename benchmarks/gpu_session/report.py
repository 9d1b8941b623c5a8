"""Tables, pictures and ``report.md`` of a run of :mod:`benchmarks.gpu_session`, from its JSON lines
alone.

>>> python -m benchmarks.gpu_session.report runs/gpu
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.common import cli
from benchmarks.common.files import replace_file
from benchmarks.common.markdown import escape, table
from benchmarks.common.records import Row, facts, load, write_csv
from benchmarks.gpu_session import plots
from benchmarks.kernels.comparison import DENSE, OURS, PEER

TITLE = "neq_kernels on a GPU"
PAGE = "report.md"
FAILED = "failed"
NOT_RUN = "The tests of the kernels were not run: each gradient was compared before it was timed."
FIGURES = (PEER, OURS, f"{OURS} custom", f"{OURS} pack", f"{OURS} dense", f"{OURS} aten")


def record_of(phase: str, folder: Path) -> Path:
    """Where a measured phase writes its rows."""
    return folder / f"gpu_{phase}.jsonl"


def write(folder: Path) -> Path:
    """Write the tables (CSV), draw the pictures, write the page.

    Raises:
        FileNotFoundError: no record of a run in ``folder``.
    """
    header, rows = _tabulated(folder / "gpu.jsonl")
    body = [
        f"# {TITLE}",
        escape(_device(header)),
        f"`{header['command']}`",
        *_correctness(rows),
        *_phases(rows),
    ]
    for phase, (title, section) in SECTIONS.items():
        path = record_of(phase, folder)
        if path.exists():
            about, measured = _tabulated(path)
            csv = path.with_suffix(".csv").name
            date = about["machine"]["date"]
            body += [f"## {title}", f"Measured {date}. Every row: [{csv}]({csv})."]
            body += [*section(measured, folder), *_left_out(measured), *_errors(measured)]
    body.append(escape(facts(header["machine"])))
    replace_file(folder / PAGE, ("\n\n".join(body) + "\n").encode())
    return folder / PAGE


def _tabulated(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows of a record; beside it the table, which a phase that was killed lacks."""
    header, rows = load(path)
    write_csv(path.with_suffix(".csv"), header, rows)
    return header, rows


def _picture(path: Path, caption: str) -> str:
    return f"![{caption}]({path.name})\n\n{caption}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(titles, (list(map(escape, row)) for row in rows)))


def _device(header: Row) -> str:
    gpu = header["settings"]["gpu"]
    tf32 = [name for name, allowed in gpu["tf32"].items() if allowed]
    return (
        f"{gpu['device']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_mib']} MiB; PyTorch "
        f"{gpu['torch']}, Triton {gpu['triton']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, driver "
        f"{gpu['driver']}. TF32 in float32: {' and '.join(tf32) or 'no'}."
    )


def _correctness(rows: Sequence[Row]) -> list[str]:
    checks = [row for row in rows if "check" in row]
    if not checks:
        return [f"**{NOT_RUN}**"]
    count = Counter(row["status"] for row in checks)
    bad = [row for row in checks if row["status"] == FAILED]
    if bad:
        backends = sorted({name for row in bad for name in row["backends"].split()})
        failed = f"{len(bad)} of {len(checks)} checks failed"
        verdict = f"**{failed}; of {', '.join(backends)} nothing is timed.**"
    else:
        text = ", ".join(f"{n} {status}" for status, n in count.items())
        verdict = f"Checks on this card: {text}."
    titles = ["check", "status", "detail"]
    return ["## Correctness", verdict, _table(titles, map(_check, checks))]


def _check(row: Row) -> list[str]:
    status = row["status"]
    return [row["check"], status.upper() if status == FAILED else status, row["detail"]]


def _phases(rows: Sequence[Row]) -> list[str]:
    """What did not run as it should."""
    odd = [row for row in rows if "check" not in row and row["status"] != "measured"]
    return [f"**{escape(row['phase'])}: {escape(row['status'])}**" for row in odd]


def _kernels(rows: Sequence[Row], folder: Path) -> list[str]:
    timed = [row for row in rows if "seconds_median" in row]
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in timed:
        name = f"{row['network']} {row['layer']}"
        key = (name, row["layout"], row["dtype"], row["input"], row["weight"], f"{row['share']:g}")
        cells.setdefault(key, {})[row["provider"]] = row
    lines = []
    above = ""
    for (name, layout, dtype, x, weight, share), by in cells.items():
        layer = f"{name}, {layout}, {dtype}, {x} by {weight}"
        dense = f"{by[DENSE]['seconds_median'] * 1e6:.1f}" if DENSE in by else "–"
        over_peer = by.get(OURS, {}).get(f"over_{PEER}_median")
        lines.append(
            [
                "" if layer == above else layer,
                share,
                dense,
                *(_ratio(by.get(provider, {}), "over_dense") for provider in FIGURES),
                "–" if over_peer is None else f"{over_peer:.2f}",
                by.get(OURS, {}).get("strategy", "–"),
            ]
        )
        above = layer
    parts = [
        "The weight gradient alone, with random channels active; times faster than PyTorch's dense "
        "one: medians of calls in turns, each after a write that leaves nothing of its operands in "
        "the L2 cache, by events on the GPU. *index_select* is what a careful user writes (gather, "
        "PyTorch's kernel, scatter), *neq* what a layer runs by itself, *custom*, *pack* and "
        "*dense* one strategy each, *aten* the default backend."
    ]
    if timed:
        plots.kernels(timed, folder / "gpu_kernels.png")
        caption = "Geometric means over the layers, against the share of active channels."
        parts.append(_picture(folder / "gpu_kernels.png", caption))
        titles = [name.removeprefix(f"{OURS} ") for name in FIGURES]
        columns = ["layer", "r", "dense, µs", *titles, "neq over index_select", "neq ran"]
        parts.append(_table(columns, lines))
    return parts


def _steps(rows: Sequence[Row], folder: Path) -> list[str]:
    timed = [row for row in rows if "speedup_median" in row]
    parts = [
        "Forward, backward and optimizer (SGD with momentum) under bfloat16 autocast, the share "
        "*r* of the channels of every layer active; times faster than the dense step, medians "
        "of steps in turns. The bound is 1/(1 − what freezing can save), from the measured dense "
        "step; with floor, each layer still reads its operands and writes its gradient. *No "
        "wgrad* is the dense model without any weight gradient of a product."
    ]
    if not timed:
        return parts
    if any(row["provider"] == OURS for row in timed):
        plots.steps(timed, folder / "gpu_steps.png")
        caption = "Whole steps against the share of active channels; dashed: the bound."
        parts.append(_picture(folder / "gpu_steps.png", caption))
    dense = {_cell(row): row for row in rows if row.get("provider") == DENSE and "r" in row}
    lines = [
        [
            row["model"],
            row["layout"],
            f"{row['r']:g}",
            row["provider"],
            f"{1e3 * dense[_cell(row)]['total_seconds_median']:.2f}",
            f"{1e3 * row['total_seconds_median']:.2f}",
            f"{row['speedup_median']:.3f}",
            f"{row['speedup_p20']:.2f}–{row['speedup_p80']:.2f}",
            f"{row['bound']:.3f}" if "bound" in row else "",
            f"{row['bound_floor']:.3f}" if "bound" in row else "",
            row["backend"] if row["provider"] == OURS else "",
        ]
        for row in timed
    ]
    columns = ["model", "layout", "r", "provider", "dense, ms", "step, ms", "speed-up", "p20–p80"]
    return [*parts, _table([*columns, "bound", "with floor", "backend"], lines)]


def _cell(row: Row) -> tuple[object, ...]:
    return row["model"], row["layout"], row["backend"], row["r"]


def _energy(rows: Sequence[Row], folder: Path) -> list[str]:
    for row in rows:
        if "no_counter" in row:
            return [escape(f"{row['no_counter']} ({row['reasons']})")]
    lines = [
        [
            f"{row['model']}, r = {row['r']:g}",
            row["provider"],
            f"{row['joules_per_step_median']:.3f}",
            f"{row['watts']:.0f}",
            f"{1e3 * row['seconds_per_step']:.2f}",
            _ratio(row, "over_dense"),
            row["source"],
        ]
        for row in rows
        if "joules_per_step_median" in row
    ]
    columns = ["model", "provider", "J per step", "W", "ms per step", "times less", "counter"]
    return [
        "The whole GPU, idle power included; steps follow each other without a wait for the "
        "device, so they are shorter than those above.",
        *([_table(columns, lines)] if lines else []),
    ]


def _ratio(row: Row, name: str) -> str:
    value = row.get(f"{name}_median")
    return "–" if value is None else f"{value:.2f}"


def _left_out(rows: Iterable[Row]) -> list[str]:
    left = [row for row in rows if row.get("left_out")]
    if not left:
        return []
    counted = Counter(_name(row) for row in left)
    text = "; ".join(f"{name} ({n})" for name, n in counted.items())
    return [f"Left out for lack of time, with the number of cells: {escape(text)}."]


def _errors(rows: Iterable[Row]) -> list[str]:
    bad = [row for row in rows if "error" in row or "wrong" in row]
    texts = [
        f"{_name(row)} {row.get('provider', '')}: {row.get('wrong', row.get('error'))}"
        for row in bad
    ]
    if not texts:
        return []
    counted = Counter(texts).items()
    lines = [f"- {escape(f'{text} ({n})' if n > 1 else text)}" for text, n in counted]
    return ["**Not measured:**", "\n".join(lines)]


def _name(row: Row) -> str:
    keys = ("network", "layer", "dtype", "model", "layout", "backend")
    return " ".join(str(row[key]) for key in keys if key in row)


Section = Callable[[Sequence[Row], Path], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "kernels": ("Kernels", _kernels),
    "steps": ("Steps", _steps),
    "energy": ("Energy", _energy),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("folder", type=Path, help="of the records")
    try:
        print(write(parser.parse_args(arguments).folder))
    except (OSError, ValueError) as error:
        return cli.user_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
