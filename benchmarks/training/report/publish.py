"""Put a finished demo into the repository: its figures and pictures, and the README's block.

    python -m benchmarks.training.report.publish runs/demo

Copies ``summary.csv``, ``summary.json`` and the pictures to ``benchmarks/results/demo`` and writes
the README's table from that copy, so that every figure there has a committed source.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.files import RESULTS, ROOT, replace_file
from benchmarks.training.run_folder import RunError

DEMO = RESULTS / "demo"
README = ROOT / "README.md"
FILES = ("summary.csv", "summary.json", "step_time.png", "frozen.png", "accuracy.png", "phases.png")
BEGIN = "<!-- demo: begin (written by python -m benchmarks.training.report.publish) -->\n"
END = "<!-- demo: end -->\n"


def readme_block(summary: Mapping[str, Any]) -> str:
    """The README's text about the demo, from its ``summary.json``."""
    machine = summary["machine"]
    lines = [
        "![Step time per epoch, measured, with its bound](benchmarks/results/demo/step_time.png)",
        "",
        "![Frozen share of every layer in every epoch](benchmarks/results/demo/frozen.png)",
        "",
        f"`make demo`, {machine['date'][:10]}: {machine['cpu']}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}. Source of every figure: "
        "[summary.csv](benchmarks/results/demo/summary.csv).",
        "",
        "| scene | policy | test accuracy | step, ms | frozen, mean | frozen, last epoch "
        "| step speed-up (bound) | in the last epoch (bound) | saved net, s |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in summary["runs"]),
        "",
        "*Step*: forward, backward and optimizer. *Frozen*: weighted by MACs. *Saved net*: seconds "
        "saved in steps over the whole run, the controller's own time counted in; negative: lost.",
        "",
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
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
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def with_block(readme: str, block: str) -> str:
    """``readme`` with the text between the markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the lines {BEGIN.strip()} and {END.strip()}")
    return head + begin + block + end + tail


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.report.publish", description=__doc__
    )
    parser.add_argument("demo", type=Path, help="a finished demo's folder")
    demo = parser.parse_args(arguments).demo
    try:
        missing = [name for name in FILES if not (demo / name).is_file()]
        if missing:
            raise RunError(f"{demo}: expected a finished demo, lacks {', '.join(missing)}")
        DEMO.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(demo / name, DEMO / name)
        summary = json.loads((DEMO / "summary.json").read_text())
        text = with_block(README.read_text(), readme_block(summary))
        replace_file(README, text.encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{DEMO.relative_to(ROOT)} and README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
