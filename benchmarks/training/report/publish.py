"""Put a finished demo into the repository: its figures and pictures, and the block of
``docs/results.md``.

    python -m benchmarks.training.report.publish runs/demo

Copies ``summary.csv``, ``summary.json`` and the pictures to the folder of this machine's class in
``benchmarks/results/demo`` and writes the block, of every class, from these copies, so that every
figure there has a committed source.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import by_class, cli, markdown
from benchmarks.common.files import RESULTS
from benchmarks.common.readme_block import Block
from benchmarks.training.run_folder import RunError

DEMO = RESULTS / "demo"
FILES = ("summary.csv", "summary.json", "step_time.png", "frozen.png", "accuracy.png", "phases.png")
COLUMNS = (
    "scene",
    "policy",
    "test accuracy",
    "step, ms",
    "frozen, mean",
    "frozen, last epoch",
    "step speed-up (bound)",
    "in the last epoch (bound)",
    "saved net, s",
)
BLOCK = Block("demo", "python -m benchmarks.training.report.publish")


def published() -> str:
    """The block's text, from the committed files of every class of CPU.

    Raises:
        ValueError: files in the folder of another class than their machine's.
    """
    text = ""
    for name, folder in by_class.folders(DEMO).items():
        summary = json.loads((folder / "summary.json").read_text())
        by_class.check(summary["machine"], name, folder)
        text += f"### The demo on {name}\n\n{block_text(summary, folder)}\n"
    return text


def block_text(summary: Mapping[str, Any], folder: Path) -> str:
    """What the page says of the demo in a folder, from its ``summary.json``."""
    machine = summary["machine"]
    lines = [
        f"![Step time per epoch, measured, with its bound]({BLOCK.link(folder / 'step_time.png')})",
        "",
        f"![Frozen share of every layer in every epoch]({BLOCK.link(folder / 'frozen.png')})",
        "",
        f"`make demo`, {machine['date'][:10]}: {machine['cpu']}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}. Source of every figure: "
        f"[summary.csv]({BLOCK.link(folder / 'summary.csv')}).",
        "",
        *markdown.table(COLUMNS, map(_cells, summary["runs"])),
        "",
        "*Step*: forward, backward and optimizer. *Frozen*: weighted by MACs. *Saved net*: seconds "
        "saved in steps over the whole run, the controller's own time counted in; negative: lost.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [
        row["scene"],
        row["run"],
        f"{row['test_accuracy']:.1%}",
        f"{row['step_ms']:.1f}",
        f"{row['frozen_mean']:.1%}",
        f"{row['frozen_last_epoch']:.1%}",
    ]
    if "saved_seconds" in row:
        cells += [
            f"{row['speedup_mean']:.3f} ({row['bound_mean']:.3f})",
            f"{row['speedup_last_epoch']:.3f} ({row['bound_last_epoch']:.3f})",
            f"{row['saved_seconds']:+.1f} of {row['dense_step_seconds']:.1f}",
        ]
    return cells + [""] * (len(COLUMNS) - len(cells))


def publish(demo: Path) -> None:
    """Copy what is published of the demo in this folder, and write the page's block from the copy.

    Raises:
        RunError: the demo is not finished.
        ValueError: it ran on a machine of another class, or the page has no place for the block.
    """
    missing = [name for name in FILES if not (demo / name).is_file()]
    if missing:
        raise RunError(f"{demo}: expected a finished demo, lacks {', '.join(missing)}")
    BLOCK.text()
    machine = json.loads((demo / "summary.json").read_text())["machine"]
    folder = by_class.own_folder(DEMO, machine, demo)
    if demo.resolve() != folder.resolve():
        for name in FILES:
            shutil.copyfile(demo / name, folder / name)
    BLOCK.write(published())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("demo", type=Path, help="a finished demo's folder")
    demo = parser.parse_args(arguments).demo
    try:
        publish(demo)
    except (ValueError, OSError) as error:
        return cli.user_error(error)
    print(f"{DEMO}\n{BLOCK.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
