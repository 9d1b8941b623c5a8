"""A small, complete experiment: what NEq freezes, and what not training it saves on this machine.

    python -m benchmarks.training.demo            # runs/demo/report.html, a few minutes
    python -m benchmarks.training.demo --quick    # in a minute, to see that everything works

Two scenes on the bundled Fashion-MNIST subset. The runs of a scene start from the same weights, see
the same images in the same order, and take turns step by step in one process, so that whatever else
the machine does falls on all of them alike. (Epoch by epoch where there is an energy counter, since
that cannot tell the runs apart.)
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import cli, interrupt
from benchmarks.common.interrupt import Interruptible
from benchmarks.training.report import html, report
from benchmarks.training.report.results import Result
from benchmarks.training.run import Run
from benchmarks.training.run_folder import RunError, RunFolder
from benchmarks.training.settings import Settings
from benchmarks.training.train import (
    describe,
    finish_epoch,
    finish_run,
    load_data,
    open_run,
    profile_run,
)
from neq_kernels.measure.timing import Quantiles
from neq_kernels.optim import step_check


@dataclass(frozen=True)
class DemoPlan:
    """The demo's settings; ``base`` is what all runs of both scenes share."""

    base: Settings
    scratch_epochs: int
    continued_epochs: int
    continued_lr: float


FULL = DemoPlan(
    base=Settings(
        model="resnet20",
        data="fashion-mnist",
        policy="dense",
        limit_train=2000,
        limit_test=1000,
        batch=50,
        lr=0.1,
        augment="none",
    ),
    scratch_epochs=10,
    continued_epochs=10,
    continued_lr=0.01,
)
QUICK = replace(
    FULL,
    base=replace(FULL.base, limit_train=200, limit_test=100, image_size=14),
    scratch_epochs=3,
    continued_epochs=4,
)

LEAD = (
    "<p>NEq (Neurons at Equilibrium) stops updating the neurons (output channels) whose response "
    "to a fixed set of probe images no longer changes. <code>neq_kernels</code> computes weight "
    "gradients for the other neurons only. This page is made from the files of one run on the "
    "machine named at the foot; nothing in it is estimated.</p>"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for an error, 128 + signal when interrupted."""
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--quick", action="store_true", help="few images and epochs, one minute")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to (over)write")
    parser.add_argument(
        "--threads", type=cli.positive, help="CPU threads (default: PyTorch's own choice)"
    )
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else FULL
    plan = replace(plan, base=replace(plan.base, threads=given.threads))
    start = time.perf_counter()
    code = interrupt.exit_code(lambda interruptible: run_demo(plan, given.out, interruptible))
    if code == 0:
        print(f"{time.perf_counter() - start:.0f} s; report: {given.out / 'report.html'}")
    return code


def run_demo(plan: DemoPlan, out: Path, interruptible: Interruptible) -> None:
    """Train both scenes below ``out`` and write the report.

    Raises:
        RunError: ``out`` holds something else than an earlier demo.
        Interrupted: a signal came.
    """
    _make_room(out)
    if plan.base.threads is not None:
        torch.set_num_threads(plan.base.threads)
    scratch = replace(plan.base, epochs=plan.scratch_epochs)
    scratch_settings = {policy: replace(scratch, policy=policy) for policy in ("dense", "neq")}
    continued = replace(
        plan.base,
        epochs=plan.continued_epochs,
        lr=plan.continued_lr,
        init=str(out / "scratch-dense" / "weights.safetensors"),
    )
    continued_settings = {
        policy: replace(continued, policy=policy) for policy in ("dense", "neq", "stochastic")
    }
    scenes = [
        report.Scene(
            "From scratch",
            _scratch_text(scratch),
            _train_in_turns(out, "scratch", scratch_settings, interruptible),
        ),
        report.Scene(
            "Continued training",
            _continued_text(continued),
            _train_in_turns(out, "continued", continued_settings, interruptible),
        ),
    ]
    report.write_comparison(out, "NEq, measured: the demo", LEAD, scenes)


def _train_in_turns(
    out: Path, scene: str, settings: Mapping[str, Settings], interruptible: Interruptible
) -> list[Result]:
    """Train the runs of a scene side by side."""
    data = load_data(settings["dense"])
    folders = {name: RunFolder(out / f"{scene}-{name}") for name in settings}
    runs = {name: open_run(folders[name], settings[name], data) for name in settings}
    profile_run(folders["dense"], runs["dense"])
    for name in settings:
        folders[name].write_json("profile.json", folders["dense"].read_json("profile.json"))
        profile_run(folders[name], runs[name])
    epochs = settings["dense"].epochs
    total = epochs * sum(run.steps_per_epoch for run in runs.values())
    with tqdm(total=total, unit="step", desc=scene, disable=None) as bar:

        def on_step(loss: float) -> None:
            bar.update()
            interruptible.check()

        for _ in range(epochs):
            _epoch_in_turns(runs, on_step)
            for name, run in runs.items():
                finish_epoch(folders[name], run)
                words = describe(run.last_record, epochs)
                bar.write(f"{scene:>9} {name:<10} {words}", file=sys.stdout)
    for name, folder in folders.items():
        finish_run(folder, runs[name])
    return [Result.read(folder, name) for name, folder in folders.items()]


def _epoch_in_turns(runs: Mapping[str, Run], on_step: Callable[[float], None]) -> None:
    """One epoch of each run, a step each in turn; who begins changes all the time."""
    turns = list(runs.values())
    if turns[0].counts_energy:
        first = turns[0].epoch % len(turns)
        for run in turns[first:] + turns[:first]:
            run.train_epoch(on_step)
        return
    steps = [run.epoch_by_steps() for run in turns]
    for _ in range(turns[0].steps_per_epoch):
        for steps_of_run in steps:
            on_step(next(steps_of_run))
        steps = steps[1:] + steps[:1]
    for steps_of_run in steps:
        next(steps_of_run, None)  # controller and evaluation
    dense = runs["dense"].last_steps
    for run in runs.values():
        ratio = Quantiles.of([d / s for d, s in zip(dense, run.last_steps, strict=True)])
        run.last_record["speedup"] = [ratio.p20, ratio.median, ratio.p80]


def _scratch_text(settings: Settings) -> str:
    return (
        f"{_common_text(settings)} Training starts from random weights with learning rate "
        f"{settings.lr}, falling to 0 along a cosine. Neurons reach equilibrium when the learning "
        "rate is nearly gone, so a run as short as this one freezes late and cannot save much: the "
        "scene shows what the method costs while it has little to freeze."
    )


def _continued_text(settings: Settings) -> str:
    return (
        f"{_common_text(settings)} Training goes on from the weights that the first scene's dense "
        f"run ended with, at learning rate {settings.lr}, falling to 0 along a cosine. Here "
        "equilibrium is near. <i>stochastic</i> freezes a fresh random half of every layer in each "
        "epoch, as a yardstick: the same machinery, no choice."
    )


def _common_text(settings: Settings) -> str:
    return html.escape(
        f"{settings.model} on {settings.limit_train} images of {settings.data}, tested on "
        f"{settings.limit_test} others; {settings.optimizer} with momentum {settings.momentum} and "
        f"weight decay {settings.weight_decay}, batches of {settings.batch}, {settings.epochs} "
        f"epochs, seed {settings.seed} in every run, NEq with eps {settings.eps} and mu "
        f"{settings.mu} on {settings.probe} probe images."
    )


def _make_room(out: Path) -> None:
    """Remove an earlier demo's files; whatever else lies in ``out`` is refused."""
    marker = out / "demo.json"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise RunError(
                f"{out}: holds something else than an earlier demo; choose another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}\n")


if __name__ == "__main__":
    os.environ.setdefault(step_check.VARIABLE, "1")
    sys.exit(main())
