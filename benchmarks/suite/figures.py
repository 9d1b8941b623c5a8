"""The pictures of the benchmark suite, drawn from its records alone.

>>> python -m benchmarks.suite.figures runs/bench
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from benchmarks.common import cli
from benchmarks.common.plot_style import COLORS, FAINT, INK, STYLE
from benchmarks.common.records import Row, load
from benchmarks.kernels.goals import geometric_mean
from benchmarks.kernels.layer_shapes import problems_by_cell
from neq_kernels.backends.problem import Problem

PEER_COLOR = "#b45309"
STRATEGY_COLORS = {
    "dense": "#cbd5e1",
    "pack": "#f59e0b",
    "custom": "#0f766e",
}
PANELS = (("nchw", "convolutions, NCHW"), ("nhwc", "convolutions, NHWC"), ("rows", "linear"))


def kernel_speedups(rows: Sequence[Row], path: Path) -> None:
    """Geometric means over the shapes, against the share of active channels; the grey line is the
    share of arithmetic that is left."""
    _fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), sharey=True)
    for axis, (layout, title) in zip(axes, PANELS, strict=True):
        here = [row for row in rows if row["layout"] == layout and row["share"] != "1/K"]
        shares = sorted({float(row["share"]) for row in here}, reverse=True)
        axis.plot(shares, [1 / s for s in shares], color=FAINT, lw=4, label="1 / share")
        for provider, ink in (("index_select", PEER_COLOR), ("neq", COLORS["neq"])):
            for kind, line in (("depthwise", ":"), ("", "-")):
                points = _means(here, provider, kind)
                if points:
                    name = f"{provider}, {kind}" if kind else provider
                    axis.plot(
                        *zip(*points, strict=True), line, marker="o", ms=4, color=ink, label=name
                    )
        share_axis(axis, shares)
        axis.set_yscale("log", base=2)
        axis.set_title(title)
    axes[0].set_ylabel("times faster than dense")
    # There is room above the lines of linear layers, which have no depthwise ones.
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="upper left")
    _save(path)


def _means(rows: Iterable[Row], provider: str, kind: str) -> list[tuple[float, float]]:
    ratios = defaultdict(list)
    for row in rows:
        of_kind = row["kind"] == "depthwise" if kind else row["kind"] != "depthwise"
        if row["provider"] == provider and of_kind and "over_dense_median" in row:
            ratios[float(row["share"])].append(row["over_dense_median"])
    return [(share, geometric_mean(ratios[share])) for share in sorted(ratios, reverse=True)]


def roofline(rows: Sequence[Row], header: Row, path: Path) -> None:
    """Arithmetic that had to be done per second, against products per byte that had to be moved,
    layer by layer with half and a tenth of the channels active."""
    peak, bandwidth = header["settings"]["peak_flops"], header["settings"]["read_bandwidth"]
    problems = problems_by_cell()
    _fig, axes = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True)
    for axis, share in zip(axes, ("0.5", "0.1"), strict=True):
        for provider, ink in (("dense", "#94a3b8"), ("neq", COLORS["neq"])):
            points = [
                _roof_point(row, problems)
                for row in rows
                if row["provider"] == provider and row["share"] == share and "wrong" not in row
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=9, color=ink, alpha=0.6, label=provider)
        reach = np.array([0.05, peak / bandwidth, 500])
        axis.plot(reach, np.minimum(peak, reach * bandwidth) / 1e9, color=INK, lw=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("needed FLOP per byte of input, active dY and weight rows")
        axis.set_title(f"{float(share):.0%} of the channels active")
    axes[0].set_ylabel("needed GFLOP per second")
    axes[0].legend()
    _save(path)


def _roof_point(row: Row, problems: dict[tuple[str, str, str], Problem]) -> tuple[float, float]:
    problem, n = problems[row["network"], row["layer"], row["layout"]], row["active"]
    t, c = problem.output_positions, problem.row_size
    flops = 2 * t * c * n
    moved = 4 * (np.prod(problem.input_size) + t * n + c * n)
    return flops / moved, flops / row["seconds_median"] / 1e9


def strategies(rows: Sequence[Row], path: Path) -> None:
    """The strategy chosen for every layer and share."""
    ours = [row for row in rows if row["provider"] == "neq" and row["run"] == 0]
    shares = list(dict.fromkeys(row["share"] for row in ours))
    names = list(STRATEGY_COLORS)
    layers = {
        layout: list(dict.fromkeys(_layer(r) for r in ours if r["layout"] == layout))
        for layout, _ in PANELS
    }
    height = max(map(len, layers.values()))
    fig, axes = plt.subplots(1, 3, figsize=(11, 1.2 + 0.13 * height))
    for axis, (layout, title) in zip(axes, PANELS, strict=True):
        grid = np.full((max(1, len(layers[layout])), len(shares)), np.nan)
        for row in ours:
            if row["layout"] == layout:
                at = layers[layout].index(_layer(row)), shares.index(row["share"])
                grid[at] = names.index(row["strategy"])
        colors = ListedColormap([STRATEGY_COLORS[name] for name in names])
        axis.imshow(grid, aspect="auto", cmap=colors, vmin=-0.5, vmax=len(names) - 0.5)
        axis.set_xticks(range(len(shares)), shares)
        axis.set_yticks(range(len(layers[layout])), layers[layout], fontsize=5)
        axis.grid(False)
        axis.set_title(title)
    handles = [Patch(color=ink, label=name) for name, ink in STRATEGY_COLORS.items()]
    fig.legend(handles=handles, ncols=len(handles), loc="upper center")
    fig.tight_layout(rect=(0, 0, 1, 0.97))
    _save(path)


def _layer(row: Row) -> str:
    return f"{row['network']} {row['weight']}"


def step_speedups(rows: Sequence[Row], path: Path) -> None:
    """Whole steps against the share of active channels, with the 95 % interval of each and both
    bounds, model by model."""
    rows = [row for row in rows if "error" not in row]
    panels = list(dict.fromkeys(map(_panel_of, rows)))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(2.8 * columns, 2.5 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = [row for row in rows if _panel_of(row) == panel]
        ours = sorted((r for r in here if r["provider"] == "neq"), key=lambda row: -row["r"])
        at = range(len(ours))
        axis.plot(at, [row["bound"] for row in ours], color=INK, lw=0.8, ls="--", label="bound")
        axis.plot(at, [row["bound_floor"] for row in ours], color=INK, lw=0.8, label="with floor")
        for provider, ink in (("peer1", PEER_COLOR), ("neq", COLORS["neq"])):
            drawn = sorted((r for r in here if r["provider"] == provider), key=lambda r: -r["r"])
            if not drawn:
                continue
            middle = [row["speedup_median"] for row in drawn]
            ends = [_ends(row) for row in drawn]
            spread = [
                [m - low for m, (low, _) in zip(middle, ends, strict=True)],
                [high - m for m, (_, high) in zip(middle, ends, strict=True)],
            ]
            axis.errorbar(at, middle, spread, color=ink, marker="o", ms=3, lw=1.2, label=provider)
        axis.set_xticks(list(at), [f"{row['r']:g}" for row in ours])
        axis.axhline(1, color=FAINT)
        axis.set_title(", ".join(part for part in panel if part != "any"), fontsize=9)
    axes[0][0].legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("times faster than dense")
    for axis in axes[-1]:
        axis.set_xlabel("active share r")
    fig.tight_layout()
    _save(path)


def _ends(row: Row) -> tuple[float, float]:
    """Of the interval; of few rounds only quantiles are known."""
    if "speedup_low" in row:
        return row["speedup_low"], row["speedup_high"]
    return row["speedup_p20"], row["speedup_p80"]


def _panel_of(row: Row) -> tuple[str, str, str]:
    return row["model"], row["layout"], row["dtype"]


def share_axis(axis: Axes, shares: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.minorticks_off()
    axis.set_xlabel("active share of the channels")


def _save(path: Path) -> None:
    plt.savefig(path)
    plt.close()


def draw(folder: Path) -> list[Path]:
    """Every picture that the records in ``folder`` allow."""
    drawn: list[Path] = []

    def picture(name: str, drawer: Callable[..., None], *args: object) -> None:
        path = folder / name
        drawer(*args, path)
        drawn.append(path)

    with plt.rc_context(STYLE):
        if (folder / "kernels.jsonl").exists():
            header, rows = load(folder / "kernels.jsonl")
            picture("kernel_speedups.png", kernel_speedups, rows)
            picture("roofline.png", roofline, rows, header)
            picture("strategies.png", strategies, rows)
        if (folder / "step.jsonl").exists():
            picture("step_speedups.png", step_speedups, load(folder / "step.jsonl")[1])
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("folder", type=Path, help="of the records")
    folder = parser.parse_args(arguments).folder
    try:
        drawn = draw(folder)
    except (OSError, ValueError) as error:
        return cli.user_error(error)
    if not drawn:
        return cli.user_error(f"no records in {folder}")
    print("\n".join(map(str, drawn)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
