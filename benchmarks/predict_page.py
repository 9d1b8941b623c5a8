"""The table and the picture of what is predicted for GPUs, from the CSV of ``benchmarks.predict``
alone."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.plots import FAINT, STYLE
from benchmarks.record import Row, load, write_csv
from benchmarks.runs import replace_file

NOTICE = "Predicted: nothing here was timed on a GPU."
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "predict"
PAGE = FOLDER / "README.md"
BEGIN = "<!-- predict: begin (written by python -m benchmarks.predict --publish) -->\n"
END = "<!-- predict: end -->\n"
GPU_COLORS = {"A100": "#b45309", "H100": "#0f766e"}


def read_csv(path: Path) -> list[Row]:
    """The rows that :class:`benchmarks.record.Record` wrote, numbers as numbers."""
    with path.open() as file:
        file.readline()
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def page_table(rows: Sequence[Row]) -> str:
    """The predictions as Markdown: a line for each model and GPU, a column for each share. A cell
    holds the pessimistic and the optimistic speed-up and, of the optimistic prediction, the one of
    the best strategies and the bound with floor."""
    shares = [r for r in dict.fromkeys(row["r"] for row in rows) if r < 1]
    cells = {(row["model"], row["gpu"], row["r"], row["assumptions"]): row for row in rows}
    titles = ["model", "GPU", *(f"predicted at r = {r:g}" for r in shares)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for model, gpu in dict.fromkeys((row["model"], row["gpu"]) for row in rows):
        line = [model, gpu]
        for r in shares:
            low, high = (cells[model, gpu, r, name] for name in ("pessimistic", "optimistic"))
            line.append(
                f"{low['predicted_speedup']:.2f}–{high['predicted_speedup']:.2f} "
                f"/ {high['predicted_speedup_best_strategies']:.2f} "
                f"({high['predicted_bound_floor']:.2f})"
            )
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, ""])


def publish(folder: Path) -> list[Path]:
    """Copy the CSV of a finished run, draw the picture and write the page's table from the copy.

    Raises:
        FileNotFoundError: no record in ``folder``.
        ValueError: the page has no place for the table.
    """
    header, records = load(folder / "predict.jsonl")
    text = PAGE.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE.name}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "predict.csv"
    write_csv(path, header, records)
    copied = read_csv(path)
    picture = RESULTS / "predicted_speedups.png"
    draw(copied, picture)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    replace_file(PAGE, (before + BEGIN + page_table(copied) + END + after).encode())
    return [path, picture, PAGE]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Predicted speed-up against the share of active channels, model by model: from the pessimistic
    to the optimistic prediction, with the optimistic one's bound."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    shares = sorted({row["r"] for row in rows}, reverse=True)
    columns = min(4, len(models) + 1)
    lines = -(-(len(models) + 1) // columns)  # the legend takes a panel
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(2.8 * columns, 2.5 * lines),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, model in zip(axes.flat, models, strict=False):
            for gpu in gpus:
                _panel(axis, [r for r in rows if (r["model"], r["gpu"]) == (model, gpu)], gpu)
            axis.axhline(1, color=FAINT, lw=2, zorder=0)
            axis.set_xticks(range(len(shares)), [f"{r:g}" for r in shares])
            axis.set_title(f"{model}, predicted", fontsize=9)
            axis.set_xlabel("active share r")
        for axis in axes[:, 0]:
            axis.set_ylabel("predicted speed-up")
        for axis in axes.flat[len(models) :]:
            axis.axis("off")
        axes.flat[len(models)].legend(
            *axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="center"
        )
        figure.suptitle(NOTICE, fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def _panel(axis: Axes, rows: Sequence[Row], gpu: str) -> None:
    low, high = (
        sorted((row for row in rows if row["assumptions"] == name), key=lambda row: -row["r"])
        for name in ("pessimistic", "optimistic")
    )
    ink, at = GPU_COLORS.get(gpu), range(len(high))
    least, most = ([row["predicted_speedup"] for row in each] for each in (low, high))
    axis.fill_between(at, least, most, color=ink, alpha=0.2, lw=0)
    axis.plot(
        at,
        most,
        color=ink,
        marker="o",
        ms=3,
        lw=1.2,
        label=f"{gpu}, predicted: optimistic\n(line) to pessimistic",
    )
    axis.plot(
        at,
        [row["predicted_bound_floor"] for row in high],
        color=ink,
        ls="--",
        lw=0.8,
        label=f"{gpu}, predicted bound with floor",
    )
