"""``report.html`` and ``summary.csv`` from the files of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.files import replace_file, write_csv
from benchmarks.training.report import html, plots
from benchmarks.training.report.results import Comparison, Result
from benchmarks.training.run_folder import RunFolder
from neq_kernels.measure.timing import PHASES


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
    scene = Scene(folder.path.name, describe_settings(result.settings), [result])
    _write_page(folder.path, f"Training run: {folder.path.name}", "", [scene])


def write_comparison(out: Path, title: str, lead: str, scenes: Sequence[Scene]) -> None:
    """``summary.csv`` and ``.json`` (one row per run), plots and ``report.html`` in ``out``."""
    rows = [summary_row(scene, result) for scene in scenes for result in scene.results]
    write_csv(out / "summary.csv", rows)
    machine = scenes[0].results[0].machine
    RunFolder(out).write_json("summary.json", {"machine": machine, "runs": rows})
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
        **{f"{phase}_ms": result.mean_step_ms(phase) for phase in PHASES},
        "step_spread": result.step_spread(),
        "wgrad_share": result.profile["wgrad"] if result.profile else None,
        "frozen_mean": sum(r["frozen"] for r in result.epochs) / len(result.epochs),
        "frozen_last_epoch": result.epochs[-1]["frozen"],
        "flops_paper_millions": sum(paper for paper, _ in flops) / len(flops) / 1e6,
        "flops_executed_millions": sum(executed for _, executed in flops) / len(flops) / 1e6,
        "controller_seconds": result.seconds("controller"),
        "joules": result.joules(),
        "energy": _energy(result),
    }
    pair = scene.comparison(result)
    if pair is None or pair.epochs <= last:
        return row
    return row | {
        "dense_step_seconds": pair.dense_seconds(),
        "saved_step_seconds": pair.saved_in_steps(),
        "saved_seconds": pair.saved(),
        "saved_share": pair.saved() / pair.dense_seconds(),
        "speedup_mean": pair.mean_speedup(),
        "bound_mean": pair.mean_bound(),
        "speedup_last_epoch": pair.speedup(last),
        "bound_last_epoch": pair.bound(last),
    }


def verdicts(scene: Scene) -> list[str]:
    """What the scene's figures amount to, in words (HTML), one text per run beside the dense."""
    rows = [summary_row(scene, result) for result in scene.results]
    return [_verdict(row) for row in rows if "saved_seconds" in row]


def _verdict(row: dict[str, Any]) -> str:
    saved, share = row["saved_seconds"], row["saved_share"]
    text = (
        f"<b>{html.escape(row['run'])}</b> froze {row['frozen_mean']:.1%} of the network on "
        f"average and {row['frozen_last_epoch']:.1%} in the last epoch (weighted by MACs). Against "
        f"{row['dense_step_seconds']:.1f} s of dense steps it "
        f"{'saved' if saved > 0 else 'lost'} {abs(saved):.1f} s ({share:+.1%}), its controller's "
        f"{row['controller_seconds']:.1f} s counted in"
    )
    if row["bound_mean"] is None:
        return text + "."
    at_best = 1 - 1 / row["bound_mean"]
    text += f"; the neurons it froze allow {at_best:.1%} at best."
    return text + (" That is near zero: a short run freezes late." if at_best < 0.02 else "")


def _energy(result: Result) -> str:
    joules, source = result.joules(), result.epochs[-1]["joules_source"]
    return source if joules is None else f"{joules:.0f} J ({source})"


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
        html.figure(
            out / "step_time.png",
            "Step time (forward, backward, optimizer) per epoch, median with its p20–p80 band; "
            "beside a dense run, relative to its step of the same turn. Dashed: the least that the "
            "neurons frozen in that epoch allow, from the measured shares of the dense step.",
        ),
        html.figure(
            out / "accuracy.png",
            "Test accuracy after each epoch against seconds of training; the controller's time is "
            "counted, evaluation is not.",
        ),
        html.figure(out / "phases.png", "Where the seconds of training went."),
    ]
    frozen = [
        (f"{s.title}: {r.name}", r) for s in scenes for r in s.results if r.epochs[0]["active"]
    ]
    if frozen:
        plots.frozen_heat_map(frozen, out / "frozen.png")
        caption = (
            "Frozen share of every layer in every epoch, the network's input at the top. A dot: no "
            "neuron of the layer is active, so it needs no weight gradient at all."
        )
        figures.insert(1, html.figure(out / "frozen.png", caption))
    sections = [_scene_section(scene) for scene in scenes]
    body = [
        lead,
        *sections,
        "<h2>Pictures</h2>",
        *figures,
        html.facts(scenes[0].results[0].machine),
    ]
    replace_file(out / "report.html", html.html(title, body).encode())


def _scene_section(scene: Scene) -> str:
    rows = [summary_row(scene, result) for result in scene.results]
    return "\n".join(
        [
            f"<h2>{html.escape(scene.title)}</h2>",
            f"<p>{scene.text}</p>",
            *(f"<p class='verdict'>{words}</p>" for words in verdicts(scene)),
            html.table(
                [result.name for result in scene.results],
                [
                    (quantity, [quantity.text(row) for row in rows])
                    for quantity in QUANTITIES
                    if any(quantity.key in row for row in rows)
                ],
            ),
        ]
    )


@dataclass(frozen=True)
class Quantity:
    """A line of the table: a key of :func:`summary_row`, how it is called, written and read."""

    key: str
    name: str
    form: str
    note: str = ""

    def text(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "–" if value is None else self.form.format(value)


QUANTITIES = (
    Quantity("test_accuracy", "Test accuracy", "{:.1%}", "after the last epoch"),
    Quantity(
        "step_ms",
        "Step, ms",
        "{:.1f}",
        "forward, backward and optimizer; mean over the epochs of their median steps",
    ),
    Quantity(
        "step_spread", "p20 to p80", "{:.0%}", "of the median: how much the machine's speed varied"
    ),
    Quantity("forward_ms", "forward", "{:.1f}"),
    Quantity("backward_ms", "backward", "{:.1f}"),
    Quantity("optimizer_ms", "optimizer", "{:.2f}"),
    Quantity(
        "wgrad_share",
        "Weight gradients",
        "{:.1%}",
        "their share of the dense step, measured layer by layer",
    ),
    Quantity(
        "frozen_mean",
        "Frozen, mean",
        "{:.1%}",
        "neurons not updated, weighted by their multiply-accumulates (MACs); mean over the epochs",
    ),
    Quantity("frozen_last_epoch", "Frozen, last epoch", "{:.1%}"),
    Quantity(
        "flops_paper_millions",
        "MFLOPs, paper",
        "{:.1f}",
        "per image, the NEq paper's convention: 2 × forward MACs × active share, one of the two "
        "backward products; mean over the epochs",
    ),
    Quantity(
        "flops_executed_millions",
        "MFLOPs, executed",
        "{:.1f}",
        "per image: forward, input gradients and weight gradients as run; mean over the epochs",
    ),
    Quantity(
        "speedup_mean",
        "Step speed-up",
        "{:.3f}",
        "dense step over this one: median ratio of steps taken in turn; whole run, no controller",
    ),
    Quantity(
        "bound_mean", "its bound", "{:.3f}", "1 / (1 − share of the dense step that was frozen)"
    ),
    Quantity("speedup_last_epoch", "Step speed-up, last epoch", "{:.3f}"),
    Quantity("bound_last_epoch", "its bound", "{:.3f}"),
    Quantity(
        "saved_step_seconds",
        "Saved in steps, s",
        "{:+.2f}",
        "the speed-up of each epoch on the dense run's median steps",
    ),
    Quantity("controller_seconds", "Controller, s", "{:.2f}", "its own time, all epochs"),
    Quantity(
        "saved_seconds", "Saved net, s", "{:+.2f}", "controller counted in; negative: time lost"
    ),
    Quantity("saved_share", "of the dense run's steps", "{:+.1%}"),
    Quantity("energy", "Energy", "{}", "of training and controller, evaluation left out"),
)


def describe_settings(settings: dict[str, Any]) -> str:
    names = ("model", "data", "policy", "optimizer", "lr", "schedule", "epochs", "batch", "seed")
    return html.escape(", ".join(f"{name} {settings[name]}" for name in names))
