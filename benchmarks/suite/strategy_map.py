"""What each strategy is chosen for on each class of CPU, beside what was measured to be fastest:
a picture of the committed cost data.

>>> python -m benchmarks.suite.strategy_map
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from benchmarks.common import cli
from benchmarks.common.plot_style import STYLE
from benchmarks.kernels import wgrad_times
from benchmarks.kernels.goals import geometric_mean
from benchmarks.suite import cost_data
from benchmarks.suite.cost_data import Choice
from benchmarks.suite.figures import STRATEGY_COLORS
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.cost_model import kind

PICTURE = "strategies.png"
# Lowest share of active channels of each column.
COLUMNS = {"all": 1.0, "≥ ½": 0.5, "≥ ¼": 0.25, "≥ ⅒": 0.1, "fewer": 0.0}
GAP = 0.08


def draw(folder: Path | None = None) -> Path | None:
    """The picture, in ``folder`` (None: beside the data); None without cost data."""
    folder = folder or wgrad_times.DATA
    found: dict[str, list[Choice]] = defaultdict(list)
    for name in cost_data.paths():
        for choice in cost_data.choices(name):
            found[f"{name}, {choice.dtype}"].append(choice)
    if not found:
        return None
    kinds = sorted({kind(choice.problem) for choices in found.values() for choice in choices})
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(found), 2, squeeze=False, figsize=(9, 1 + 0.32 * len(kinds) * len(found))
        )
        for row, (name, choices) in zip(axes, found.items(), strict=True):
            regret = geometric_mean([choice.regret for choice in choices])
            _panel(row[0], choices, kinds, lambda choice: choice.chosen)
            row[0].set_title(f"{name}: chosen, {regret:.3f} of the best", fontsize=8)
            _panel(row[1], choices, kinds, lambda choice: choice.fastest)
            row[1].set_title(f"{name}: the best, as measured", fontsize=8)
            row[1].set_yticklabels([])
        handles = [Patch(color=ink, label=name) for name, ink in STRATEGY_COLORS.items()]
        fig.legend(handles=handles, ncols=len(handles), loc="upper center")
        fig.supxlabel("active share of the channels", fontsize=9)
        fig.tight_layout(rect=(0, 0, 1, 1 - 0.25 / fig.get_figheight()))
        plt.savefig(folder / PICTURE)
        plt.close()
    return folder / PICTURE


def shares(
    choices: Sequence[Choice], strategy_of: Callable[[Choice], Strategy]
) -> dict[tuple[str, str], dict[str, float]]:
    """What part of the layers of a kind, with a share of active channels, each strategy has."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for choice in choices:
        share = choice.active / choice.problem.neurons
        column = next(name for name, least in COLUMNS.items() if share >= least)
        counts[kind(choice.problem), column][strategy_of(choice).name.lower()] += 1
    return {
        where: {name: n / found.total() for name, n in found.items()}
        for where, found in counts.items()
    }


def _panel(
    axis: Axes,
    choices: Sequence[Choice],
    kinds: Sequence[str],
    strategy_of: Callable[[Choice], Strategy],
) -> None:
    """A field for each kind of layer and share of channels, divided among the strategies."""
    found = shares(choices, strategy_of)
    for y, of_layer in enumerate(kinds):
        for x, column in enumerate(COLUMNS):
            left = x + GAP / 2
            for name, ink in STRATEGY_COLORS.items():
                width = (1 - GAP) * found.get((of_layer, column), {}).get(name, 0.0)
                axis.add_patch(Rectangle((left, y + GAP / 2), width, 1 - GAP, color=ink, lw=0))
                left += width
    axis.set_xlim(0, len(COLUMNS))
    axis.set_ylim(len(kinds), 0)
    axis.set_xticks([x + 0.5 for x in range(len(COLUMNS))], list(COLUMNS), fontsize=8)
    axis.set_yticks([y + 0.5 for y in range(len(kinds))], kinds, fontsize=8)
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, help="folder (default: beside the data)")
    path = draw(parser.parse_args(arguments).out)
    if path is None:
        return cli.user_error(f"no cost data in {wgrad_times.DATA}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
