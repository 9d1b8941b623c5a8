"""The pictures of a run or a comparison, drawn from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.common.plot_style import COLORS, INK, STYLE

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.training.report.results import TRAIN_PHASES, Comparison, Result

PHASE_COLORS = {
    "data": "#d1d5db",
    "forward": "#94a3b8",
    "backward": "#0f766e",
    "optimizer": "#d97706",
    "controller": "#be123c",
}
SMALLEST_ACCURACY_SPAN = 0.1
FROZEN_MAP = LinearSegmentedColormap.from_list("frozen", ["#f8fafc", "#99c9d6", "#0e4a6b"])
Scenes = Sequence[tuple[str, Sequence[Result]]]


def color(result: Result) -> str:
    return COLORS.get(result.policy, INK)


def frozen_heat_map(panels: Sequence[tuple[str, Result]], path: Path) -> None:
    """Frozen share of each layer (rows, input at the top) in each epoch (columns); a dot where no
    neuron of the layer is active."""
    with plt.rc_context(STYLE):
        names = [list(result.epochs[0]["active"]) for _, result in panels]
        height = 0.9 + 0.155 * max(map(len, names))
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(1.6 + 3.4 * len(panels), height),
            squeeze=False,
            layout="constrained",
        )
        same_rows = all(layers == names[0] for layers in names)
        for axis, layers, (title, result) in zip(axes[0], names, panels, strict=True):
            image = _heat_map(axis, layers, result)
            axis.set_title(title)
            labels = layers if axis is axes[0][0] or not same_rows else []
            axis.set_yticks(range(len(layers)) if labels else [], labels, fontsize=7)
        bar = figure.colorbar(image, ax=list(axes[0]), fraction=0.035, pad=0.02)
        bar.set_label("frozen share of the layer's neurons")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        _save(figure, path)


def _heat_map(axis: Axes, layers: list[str], result: Result) -> object:
    share = np.array(
        [
            [1 - record["active"][name][0] / record["active"][name][1] for record in result.epochs]
            for name in layers
        ]
    )
    rows, columns = np.nonzero(share == 1)
    axis.plot(columns + 1, rows, ".", color="white", markersize=2.5)
    last = len(result.epochs) + 0.5
    axis.grid(False)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    return axis.imshow(
        share,
        cmap=FROZEN_MAP,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, last, len(layers) - 0.5, -0.5),
    )


def step_time(scenes: Scenes, path: Path) -> None:
    """Step time per epoch with its p20-p80 band; dashed: what the bound allows at best. Relative to
    the dense run's step of the same turn where a scene has one, else milliseconds."""
    with plt.rc_context(STYLE):
        figure, axes = _panels(scenes)
        for axis, (title, results) in zip(axes, scenes, strict=True):
            dense = next((r for r in results if r.policy == "dense"), None)
            if dense is None or len(results) == 1:
                _milliseconds(axis, results)
            else:
                _relative(axis, results, dense)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, axes)
        _save(figure, path)


def _milliseconds(axis: Axes, results: Sequence[Result]) -> None:
    for result in results:
        steps = np.array([record["step_ms"]["step"] for record in result.epochs])
        _banded_line(axis, result, *steps.T)
    axis.set_ylabel("step, ms")


def _relative(axis: Axes, results: Sequence[Result], dense: Result) -> None:
    axis.axhline(1, color=color(dense), lw=1.5, label="dense")
    for result in results:
        pair = Comparison(result, dense)
        if result is dense:
            continue
        times = 1 / np.array([pair.speedup_quantiles(epoch) for epoch in range(pair.epochs)])
        _banded_line(axis, result, *times.T)
        bounds = [pair.bound(epoch) for epoch in range(pair.epochs)]
        if None not in bounds:
            best = [1 / (bound or 1) for bound in bounds]
            epochs = range(1, pair.epochs + 1)
            label = f"{result.name}, bound"
            axis.plot(epochs, best, "--", color=color(result), lw=1.2, label=label)
    axis.set_ylabel("step time (dense = 100%)")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _banded_line(
    axis: Axes, result: Result, low: np.ndarray, middle: np.ndarray, high: np.ndarray
) -> None:
    epochs = np.arange(1, len(middle) + 1)
    axis.fill_between(epochs, low, high, color=color(result), alpha=0.15, linewidth=0)
    axis.plot(epochs, middle, "o-", color=color(result), markersize=3, label=result.name)


def accuracy(scenes: Scenes, path: Path) -> None:
    """Test accuracy against seconds of training, controller included, evaluation not."""
    with plt.rc_context(STYLE):
        figure, axes = _panels(scenes)
        for axis, (title, results) in zip(axes, scenes, strict=True):
            for result in results:
                values = [record["test_accuracy"] for record in result.epochs]
                axis.plot(
                    result.elapsed(),
                    values,
                    "o-",
                    color=color(result),
                    markersize=3,
                    label=result.name,
                )
            axis.set_title(title)
            axis.set_xlabel("seconds of training")
            axis.set_xlim(left=0)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            low, high = axis.get_ylim()
            padding = max(0.0, SMALLEST_ACCURACY_SPAN - (high - low)) / 2
            axis.set_ylim(low - padding, high + padding)
        axes[0].set_ylabel("test accuracy")
        _legend(figure, axes)
        _save(figure, path)


def phases(scenes: Scenes, path: Path) -> None:
    """Where the training seconds went, one bar per run."""
    bars = [(f"{title}: {r.name}", r) for title, results in scenes for r in results]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.6, 1.0 + 0.36 * len(bars)), layout="constrained")
        left = np.zeros(len(bars))
        for phase in (*TRAIN_PHASES, "controller"):
            width = np.array([result.seconds(phase) for _, result in bars])
            axis.barh(
                range(len(bars)),
                width,
                left=left,
                color=PHASE_COLORS[phase],
                label=phase,
                height=0.7,
            )
            left += width
        axis.set_yticks(range(len(bars)), [label for label, _ in bars])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("seconds")
        figure.legend(loc="outside upper center", ncols=len(PHASE_COLORS), fontsize=8.5)
        _save(figure, path)


def _panels(scenes: Scenes) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = plt.subplots(
        1, len(scenes), figsize=(4.4 * len(scenes) + 0.4, 3.4), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    lines = {}
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    figure.legend(
        lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), fontsize=9
    )


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
