"""The pictures of a run of :mod:`benchmarks.gpu_session`, drawn from its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from benchmarks.common.plot_style import COLORS, FAINT, STYLE
from benchmarks.common.records import Row
from benchmarks.kernels.comparison import OURS, PEER
from benchmarks.kernels.goals import geometric_mean
from benchmarks.suite import figures
from benchmarks.suite.figures import PEER_COLOR, STRATEGY_COLORS

PANELS = (
    ("linear", None, "linear"),
    ("conv", "nhwc", "convolutions, NHWC"),
    ("conv", "nchw", "convolutions, NCHW"),
    ("depthwise", None, "depthwise"),
)
BY_DEFAULT_COLOR = "#7c3aed"
LINES = (
    (PEER, PEER_COLOR, "-"),
    (f"{OURS} custom", STRATEGY_COLORS["custom"], ":"),
    (f"{OURS} pack", STRATEGY_COLORS["pack"], ":"),
    (f"{OURS} aten", BY_DEFAULT_COLOR, "--"),
    (OURS, COLORS["neq"], "-"),
)


def kernels(rows: Sequence[Row], path: Path) -> None:
    """Geometric means over the layers; the grey line is the share of arithmetic that is left."""
    panels = [(panel, _in(panel, rows)) for panel in PANELS if _in(panel, rows)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(0.8 + 2.9 * len(panels), 3.5),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, ((_, _, title), here) in zip(axes[0], panels, strict=True):
            shares = sorted({row["share"] for row in here}, reverse=True)
            axis.plot(shares, [1 / share for share in shares], color=FAINT, lw=4, label="1 / r")
            axis.axhline(1, color="#9ca3af", lw=0.8)
            for provider, ink, style in LINES:
                _line(axis, [row for row in here if row["provider"] == provider], ink, style)
            figures.share_axis(axis, shares)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.set_title(title)
        axes[0][0].set_ylabel("times faster than dense")
        labels: dict[str, object] = {}
        for axis in axes[0]:
            for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, line)
        figure.legend(
            labels.values(),
            labels.keys(),
            loc="outside upper center",
            ncols=len(labels),
            fontsize=8,
        )
        figure.savefig(path)
        plt.close(figure)


def _in(panel: tuple[str, str | None, str], rows: Sequence[Row]) -> list[Row]:
    kind, layout, _ = panel
    return [row for row in rows if row["kind"] == kind and layout in (None, row["layout"])]


def _line(axis: Axes, rows: Sequence[Row], ink: str, style: str) -> None:
    ratios = defaultdict(list)
    for row in rows:
        if "over_dense_median" in row:
            ratios[row["share"]].append(row["over_dense_median"])
    if ratios:
        shares = sorted(ratios, reverse=True)
        means = [geometric_mean(ratios[share]) for share in shares]
        label = rows[0]["provider"]
        axis.plot(shares, means, style, marker="o", ms=3.5, color=ink, label=label)


def steps(rows: Sequence[Row], path: Path) -> None:
    """Whole steps with both bounds, model by model and backend by backend."""
    told = [
        {**row, "layout": f"{row['layout']}, {row['backend']}".removeprefix("any, ")}
        for row in rows
    ]
    ours = {(row["model"], row["layout"]) for row in told if row["provider"] == OURS}
    with plt.rc_context(STYLE):
        figures.step_speedups([r for r in told if (r["model"], r["layout"]) in ours], path)
