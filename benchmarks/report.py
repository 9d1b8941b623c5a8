"""``report.html`` and ``summary.csv`` from the files of one run or of several.

python -m benchmarks.report runs/dense runs/neq --out runs/comparison
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import page, plots
from benchmarks.accounting import STEP_PHASES, Comparison, Result
from benchmarks.runs import RunError, RunFolder, replace_file, write_csv

NO_ENERGY = "no energy counter on this machine"


@dataclass(frozen=True)
class Scene:
    """Runs that may be compared: same data, epochs and seeds. A dense one is the measure."""

    title: str
    text: str
    results: Sequence[Result]

    @property
    def dense(self) -> Result | None:
        return next((result for result in self.results if result.policy == "dense"), None)

    def comparison(self, result: Result) -> Comparison | None:
        dense = self.dense
        return None if dense is None or result is dense else Comparison(result, dense)


def write_run_report(folder: RunFolder) -> None:
    """``summary.csv`` (one row per epoch), plots and ``report.html`` of one run.

    Raises:
        RunError: the folder holds no readable run.
    """
    result = Result.read(folder)
    folder.write_csv("summary.csv", [_epoch_row(record) for record in result.epochs])
    scene = Scene(folder.path.name, _describe_settings(result.settings), [result])
    _write_page(folder.path, f"Training run: {folder.path.name}", "", [scene])


def write_comparison(out: Path, title: str, lead: str, scenes: Sequence[Scene]) -> None:
    """``summary.csv`` and ``.json`` (one row per run), plots and ``report.html`` in ``out``."""
    rows = [summary_row(scene, result) for scene in scenes for result in scene.results]
    write_csv(out / "summary.csv", rows)
    environment = scenes[0].results[0].environment
    RunFolder(out).write_json("summary.json", {"environment": environment, "runs": rows})
    _write_page(out, title, lead, scenes)


def summary_row(scene: Scene, result: Result) -> dict[str, Any]:
    """The figures of one run, and against the scene's dense run where there is one."""
    flops = [result.flops(epoch) for epoch in range(len(result.epochs))]
    last = len(result.epochs) - 1
    row: dict[str, Any] = {
        "scene": scene.title,
        "run": result.name,
        "policy": result.policy,
        "epochs": len(result.epochs),
        "test_accuracy": result.epochs[-1]["test_accuracy"],
        "step_ms": result.mean_step_ms(),
        **{f"{phase}_ms": result.mean_step_ms(phase) for phase in STEP_PHASES},
        "wgrad_share": result.profile["wgrad_share"] if result.profile else None,
        "frozen_mean": sum(r["frozen"] for r in result.epochs) / len(result.epochs),
        "frozen_last_epoch": result.epochs[-1]["frozen"],
        "flops_paper": sum(paper for paper, _ in flops) / len(flops),
        "flops_executed": sum(executed for _, executed in flops) / len(flops),
        "controller_seconds": result.seconds("controller"),
        "joules": result.joules(),
        "joules_source": result.epochs[-1]["joules_source"],
    }
    pair = scene.comparison(result)
    if pair is None or pair.epochs <= last:
        return row
    return row | {
        "dense_step_seconds": pair.dense_seconds(),
        "saved_step_seconds": pair.saved_in_steps(),
        "saved_seconds": pair.saved(),
        "speedup_mean": pair.mean_speedup(),
        "bound_mean": pair.mean_bound(),
        "speedup_last_epoch": pair.speedup(last),
        "bound_last_epoch": pair.bound(last),
    }


def verdict(scene: Scene) -> str:
    """What the scene's figures amount to, in words."""
    sentences = []
    for result in scene.results:
        row = summary_row(scene, result)
        if "saved_seconds" not in row:
            continue
        share = row["saved_seconds"] / row["dense_step_seconds"]
        found = "saved" if share > 0 else "cost"
        near_zero = ", which is near zero: little was frozen" if abs(share) < 0.03 else ""
        sentences.append(
            f"<b>{page.escape(result.name)}</b> froze {row['frozen_mean']:.0%} of the network on "
            f"average and {row['frozen_last_epoch']:.0%} in the last epoch (weighted by MACs); it "
            f"{found} {abs(row['saved_seconds']):.1f} s of {row['dense_step_seconds']:.1f} s, "
            f"its controller's {row['controller_seconds']:.1f} s counted in "
            f"({share:+.1%}{near_zero})."
        )
    return " ".join(sentences)


def _epoch_row(record: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in record.items() if not isinstance(v, dict)}
    seconds = {f"{phase}_seconds": value for phase, value in record["seconds"].items()}
    steps = {f"{phase}_ms_median": values[1] for phase, values in record["step_ms"].items()}
    flops = {f"flops_{name}": value for name, value in record["flops"].items()}
    return plain | seconds | steps | flops


def _write_page(out: Path, title: str, lead: str, scenes: Sequence[Scene]) -> None:
    groups = [(scene.title, scene.results) for scene in scenes]
    plots.step_time(groups, out / "step_time.png")
    plots.accuracy(groups, out / "accuracy.png")
    plots.phases(groups, out / "phases.png")
    figures = [
        page.figure(
            out / "step_time.png",
            "Step time per epoch, median with its p20–p80 band. Dashed: the step time that the "
            "neurons frozen in that epoch allow at best, from the measured shares of the dense "
            "step.",
        ),
        page.figure(
            out / "accuracy.png",
            "Test accuracy after each epoch against seconds of training; the controller's time is "
            "counted, evaluation is not.",
        ),
        page.figure(out / "phases.png", "Where the seconds of training went."),
    ]
    frozen = [
        (f"{s.title}: {r.name}", r) for s in scenes for r in s.results if r.epochs[0]["active"]
    ]
    if frozen:
        plots.frozen_heat_map(frozen, out / "frozen.png")
        caption = "Frozen share of every layer in every epoch; the network's input is at the top."
        figures.insert(1, page.figure(out / "frozen.png", caption))
    sections = [_scene_section(scene) for scene in scenes]
    environment = scenes[0].results[0].environment
    body = [
        lead,
        *sections,
        "<h2>Pictures</h2>",
        *figures,
        _reading(scenes),
        page.facts(environment),
    ]
    replace_file(out / "report.html", page.html(title, body).encode())


def _scene_section(scene: Scene) -> str:
    rows = [summary_row(scene, result) for result in scene.results]
    parts = [f"<h2>{page.escape(scene.title)}</h2>", f"<p>{scene.text}</p>"]
    words = verdict(scene)
    if words:
        parts.append(f"<p class='verdict'>{words}</p>")
    parts.append(
        page.table(_columns(rows), [[_cell(k, row) for k in _columns(rows)] for row in rows])
    )
    return "\n".join(parts)


_HEADINGS = {
    "run": "policy",
    "test_accuracy": "test accuracy",
    "step_ms": "step, ms",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "frozen_mean": "frozen, mean",
    "frozen_last_epoch": "frozen, last epoch",
    "flops_paper": "FLOPs, paper",
    "flops_executed": "FLOPs, executed",
    "controller_seconds": "controller, s",
    "saved_seconds": "saved net, s",
    "speedup_mean": "speed-up",
    "bound_mean": "bound",
    "speedup_last_epoch": "speed-up, last epoch",
    "bound_last_epoch": "bound, last epoch",
    "wgrad_share": "wgrad share",
    "joules": "joules",
}
_PERCENT = {"test_accuracy", "frozen_mean", "frozen_last_epoch", "wgrad_share"}


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    present = {key for row in rows for key in row}
    return {key: heading for key, heading in _HEADINGS.items() if key in present}


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    if key == "joules" and value is None:
        return NO_ENERGY
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if key in _PERCENT:
        return f"{value:.1%}"
    if key.startswith("flops"):
        return f"{value / 1e6:.1f}M"
    if key.startswith(("speedup", "bound")):
        return f"{value:.3f}×"
    return f"{value:.1f}"


def _reading(scenes: Sequence[Scene]) -> str:
    share = next((r.profile["wgrad_share"] for s in scenes for r in s.results if r.profile), None)
    measured = "" if share is None else f" On this machine it is {share:.1%} of the dense step."
    return page.definitions(
        {
            "step": "forward, backward and optimizer; mean over the epochs of their median steps, "
            "in milliseconds. Data loading and evaluation are not in it.",
            "wgrad share": "time of the weight gradients in the dense step, measured layer by "
            f"layer.{measured}",
            "frozen": "share of the neurons that are not updated, weighted by their layer's "
            "multiply-accumulates (MACs).",
            "FLOPs, paper": "per image, the NEq paper's convention: 2 × forward MACs × active "
            "share, that is one of the two backward products.",
            "FLOPs, executed": "per image, forward + input gradients + weight gradients, as run.",
            "saved net": "seconds saved against the dense run in forward, backward and optimizer, "
            "by median steps, less the controller's own seconds. Negative: time was lost.",
            "speed-up, bound": "dense step over this policy's step, controller not counted, and "
            "the most that the frozen neurons allow: 1/(1 − their share of the dense step).",
        }
    )


def _describe_settings(settings: dict[str, Any]) -> str:
    names = ("model", "data", "policy", "optimizer", "lr", "schedule", "epochs", "batch", "seed")
    return page.escape(", ".join(f"{name} {settings[name]}" for name in names))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that benchmarks.train wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder of the comparison")
    given = parser.parse_args(arguments)
    try:
        results = [Result.read(RunFolder(path), path.name) for path in given.runs]
        given.out.mkdir(parents=True, exist_ok=True)
        scene = Scene("Runs", _describe_settings(results[0].settings), results)
        write_comparison(given.out, "Comparison of runs", "", [scene])
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
