"""Train a model on a data set under an update policy, and write ``runs/<name>/``.

    python -m benchmarks.training.train --model resnet20 --data fashion-mnist --policy neq \
        --out runs/first
    python -m benchmarks.training.train --out runs/first --resume

Ctrl-C stops after the present step; the run stays where its last whole epoch ended and goes on
with ``--resume`` to the very bits of an uninterrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import cli, interrupt, models
from benchmarks.common.interrupt import Interrupted, Interruptible
from benchmarks.training.data import datasets
from benchmarks.training.report import report
from benchmarks.training.run import Run
from benchmarks.training.run_folder import RunFolder
from benchmarks.training.settings import Settings, add_arguments
from neq_kernels.machine import machine
from neq_kernels.measure import StepShares


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for an error, 128 + signal when interrupted."""
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--out", required=True, type=Path, help="the run's folder, runs/NAME")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    add_arguments(parser)
    given = vars(parser.parse_args(arguments))
    folder, resume = RunFolder(given.pop("out")), given.pop("resume")
    return interrupt.exit_code(
        lambda interruptible: _run(folder, resume, given, interruptible),
        f"; continue with --out {folder.path} --resume",
    )


def load_data(settings: Settings) -> datasets.Dataset:
    """The data set of a run, with three channels where the model knows no other number."""
    data = datasets.load(
        settings.data,
        root=Path(settings.data_root),
        probe=settings.probe,
        limit_train=settings.limit_train,
        limit_test=settings.limit_test,
        image_size=settings.image_size,
    )
    if data.n_batches(settings.batch) == 0:
        raise ValueError(
            f"batch: expected at most the {len(data.train)} training images, got {settings.batch}"
        )
    return data.to_rgb() if _wants_rgb(settings.model) else data


def _wants_rgb(model: str) -> bool:
    """torchvision's and timm's models take three channels; ours and a user's take any number."""
    source, colon, _ = model.partition(":")
    return source in ("torchvision", "timm") if colon else model not in models.OWN_MODELS


def open_run(folder: RunFolder, settings: Settings, data: datasets.Dataset) -> Run:
    """A new run before its first epoch; its folder holds the configuration."""
    run = Run(settings, data)
    folder.create({"settings": settings.to_json(), "machine": machine().to_dict()})
    return run


def profile_run(folder: RunFolder, run: Run) -> None:
    """Measure the dense step's shares, once in a run; a resumed run reads them."""
    if not run.settings.profile:
        return
    if not folder.has("profile.json"):
        folder.write_json("profile.json", run.measure_shares().to_dict())
    run.shares = StepShares.from_dict(folder.read_json("profile.json"))


def finish_epoch(folder: RunFolder, run: Run) -> None:
    """Write an epoch down: metrics first, so that a checkpoint never lacks its own."""
    folder.append_metrics(run.last_record)
    folder.save_checkpoint(run.state_dict())


def finish_run(folder: RunFolder, run: Run) -> None:
    """The files made from the metrics, and the final weights."""
    from safetensors.torch import save_model

    save_model(run.model, str(folder.path / "weights.safetensors"))
    report.write_run_report(folder)


def _run(
    folder: RunFolder, resume: bool, given: dict[str, Any], interruptible: Interruptible
) -> None:
    settings = _settings(folder, resume, given)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if not resume:
        folder.refuse_existing()
    state = folder.load_checkpoint() if resume else None
    data = load_data(settings)
    if resume:
        run = Run(settings, data)
        if state is not None:
            run.load_state_dict(state)
        folder.keep_metrics_before(run.epoch)
    else:
        run = open_run(folder, settings, data)
    profile_run(folder, run)
    try:
        _epochs(folder, run, interruptible)
    except Interrupted:
        if folder.metrics():
            report.write_run_report(folder)
        raise
    finish_run(folder, run)
    print(f"report: {folder.path / 'report.html'}")


def _settings(folder: RunFolder, resume: bool, given: dict[str, Any]) -> Settings:
    if not resume:
        return Settings.from_json(given)
    stored = folder.config()["settings"]
    changed = {k: v for k, v in given.items() if stored.get(k) != v}
    if changed:
        raise ValueError(
            f"--resume: the settings are those of {folder.path / 'config.json'}; expected "
            + ", ".join(f"{k} {stored.get(k)!r}, got {v!r}" for k, v in changed.items())
        )
    return Settings.from_json(stored)


def _epochs(folder: RunFolder, run: Run, interruptible: Interruptible) -> None:
    epochs = run.settings.epochs
    total = epochs * run.steps_per_epoch
    done = run.epoch * run.steps_per_epoch
    with tqdm(total=total, initial=done, unit="step", disable=None) as bar:
        on_step = _watch(bar, interruptible)
        while run.epoch < epochs:
            bar.set_description(f"epoch {run.epoch + 1}/{epochs}")
            record = run.train_epoch(on_step)
            finish_epoch(folder, run)
            bar.write(describe(record, epochs), file=sys.stdout)
            interruptible.check()


def _watch(bar: Any, interruptible: Interruptible) -> Callable[[float], None]:
    def on_step(loss: float) -> None:
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        interruptible.check()

    return on_step


def describe(record: dict[str, Any], epochs: int) -> str:
    """One line about an epoch."""
    seconds = record["seconds"]
    train = sum(seconds[phase] for phase in ("data", "forward", "backward", "optimizer"))
    return (
        f"epoch {record['epoch'] + 1:>3}/{epochs}  loss {record['train_loss']:.3f}  "
        f"test accuracy {record['test_accuracy']:.2%}  frozen {record['frozen']:6.2%}  "
        f"train {train:.1f} s  controller {seconds['controller']:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
