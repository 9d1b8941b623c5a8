"""One model trained under one policy, an epoch at a time, with a clock on every phase."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.training.data.datasets import Dataset
from benchmarks.training.policies.registry import active_counts, apply_policy, make_optimizer
from benchmarks.training.settings import Settings
from neq_kernels import load_tuning_state_dict, tuning_state_dict
from neq_kernels.measure import (
    EnergyMeter,
    PhaseClock,
    StepShares,
    backward_shares,
    bound,
    flops,
    frozen_parameter_fraction,
)
from neq_kernels.measure.timing import PHASES, Quantiles

EVAL_BATCH = 500
SHARES_BATCHES = 4
EpochRecord = dict[str, Any]
Batch = tuple[Tensor, Tensor]
FLOP_PARTS = ("paper", "forward", "dgrad", "wgrad")


class Run:
    """A training run in memory: model, optimizer, controller, schedule and RNG.

    Runs may take turns in one process: each keeps an RNG state of its own. Once ``shares`` of the
    dense step are known, each epoch's record holds the bound on its speed-up.

    Args:
        settings: what to train and how.
        data: the images.

    Raises:
        ValueError: unsupported settings (unknown model, weights that do not fit, ...).
    """

    def __init__(self, settings: Settings, data: Dataset) -> None:
        self.settings = settings
        self.data = data
        self.device = _device(settings.device)
        self.epoch = 0
        self._format = torch.channels_last if settings.channels_last else torch.contiguous_format
        torch.manual_seed(settings.seed)
        self.model = models.build(
            settings.model, data.n_classes, data.shape[0], pretrained_path=settings.init
        ).to(self.device, memory_format=self._format)
        self._rng = _RngState()
        with self._rng.mine():
            self.optimizer, self.controller = apply_policy(
                self.model, settings, list(self._probe_batches())
            )
        self.schedule = _schedule(self.optimizer, settings)
        self._example = self._place(data.normalise(data.probe.x[:1]))
        self._energy = EnergyMeter()
        self.last_record: EpochRecord = {}
        self.last_steps: list[float] = []
        self.shares: StepShares | None = None

    @property
    def counts_energy(self) -> bool:
        """Whether this machine has an energy counter."""
        return bool(self._energy.counters)

    @property
    def steps_per_epoch(self) -> int:
        return self.data.n_batches(self.settings.batch)

    def train_epoch(self, on_step: Callable[[float], None]) -> EpochRecord:
        """Train one epoch, let the controller measure, evaluate.

        Args:
            on_step: called after each step with its loss; an exception from it leaves the run in
                mid-epoch, to be thrown away or loaded from a checkpoint.

        Returns:
            The epoch's record, ready for ``metrics.jsonl``.
        """
        for loss in self.epoch_by_steps():
            on_step(loss)
        return self.last_record

    def epoch_by_steps(self) -> Iterator[float]:
        """:meth:`train_epoch`, a step at a time: yields each step's loss; exhausted, it has left
        the record in ``last_record`` and the seconds of each step in ``last_steps``.

        Energy counters count the whole machine: where there are any, let an epoch run alone.
        """
        clock = PhaseClock(self.device)
        record = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "active": active_counts(self.model),
            **self._work(),
        }
        with self._energy as energy:
            record |= yield from self._train(clock)
            with self._rng.mine(), clock.phase("controller"):
                if self.controller is not None:
                    self.controller.step()
        record |= {"joules": energy.joules, "joules_source": energy.source}
        with self._rng.mine():
            record |= self._evaluate(clock)
        self.schedule.step()
        self.epoch += 1
        record |= {"seconds": clock.totals(), "step_ms": _quantiles_ms(clock)}
        self.last_record, self.last_steps = record, _steps(clock)

    def measure_shares(self) -> StepShares:
        """Where the time of this run's dense step goes; nothing of the run changes."""
        s = self.settings
        first = islice(self.data.training_batches(s.batch, s.seed, 0, s.augment), SHARES_BATCHES)
        batches = [(self._place(x), y.to(self.device)) for x, y in first]
        self.model.train()
        return backward_shares(
            self.model,
            batches,
            lambda model, batch: F.cross_entropy(self._forward(batch[0], model), batch[1]),
            lambda parameters: make_optimizer(parameters, s),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "rng": self._rng.state,
            "tuning": tuning_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self._rng.state = state["rng"]
        load_tuning_state_dict(state["tuning"])
        self.epoch = state["epoch"]

    def _work(self) -> EpochRecord:
        """Frozen share (weighted by MACs) and FLOPs per image, with the masks of this epoch."""
        count = flops.count(self.model, self._example)
        record: EpochRecord = {
            "frozen": flops.frozen_fraction(self.model, count),
            "flops": {part: getattr(count, part) for part in FLOP_PARTS},
        }
        if self.shares is not None:
            frozen_parameters = frozen_parameter_fraction(self.model)
            record["bound"] = bound(self.shares, count, frozen_parameters)
        return record

    def _train(self, clock: PhaseClock) -> Generator[float, None, EpochRecord]:
        s = self.settings
        self.model.train()
        loss_sum, correct, images = 0.0, 0, 0
        batches = self.data.training_batches(s.batch, s.seed, self.epoch, s.augment)
        for _ in range(self.steps_per_epoch):
            with self._rng.mine():
                loss, right, n = self._step(batches, clock)
            loss_sum += loss * n
            correct += right
            images += n
            yield loss
        return {
            "steps": self.steps_per_epoch,
            "images": images,
            "train_loss": loss_sum / images,
            "train_accuracy": correct / images,
        }

    def _step(self, batches: Iterator[Batch], clock: PhaseClock) -> tuple[float, int, int]:
        """Loss, images classified correctly, images."""
        with clock.phase("data"):
            x, y = next(batches)
            x, y = self._place(x), y.to(self.device)
        with clock.phase("forward"):
            output = self._forward(x)
            loss = F.cross_entropy(output, y)
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item(), int((output.argmax(1) == y).sum()), len(y)

    def _evaluate(self, clock: PhaseClock) -> EpochRecord:
        loss_sum, correct, images = 0.0, 0, self.data.test
        self.model.eval()
        with clock.phase("eval"), torch.no_grad():
            for x, y in self.data.batches(images, EVAL_BATCH):
                output, y = self._forward(self._place(x)), y.to(self.device)
                loss_sum += F.cross_entropy(output, y, reduction="sum").item()
                correct += int((output.argmax(1) == y).sum())
        return {"test_loss": loss_sum / len(images), "test_accuracy": correct / len(images)}

    def _forward(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            output = (model or self.model)(x)
        # Inception and GoogLeNet return auxiliary outputs in training; those are not trained here.
        output = getattr(output, "logits", output)
        return output.float()

    def _probe_batches(self) -> Iterator[Tensor]:
        for x, _ in self.data.batches(self.data.probe, self.settings.batch):
            yield self._place(x)

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.device, memory_format=self._format)


def _quantiles_ms(clock: PhaseClock) -> dict[str, list[float]]:
    """``{phase: [p20, median, p80]}`` over the epoch's steps, and their sum as ``step``."""
    samples = {name: clock.samples[name] for name in ("data", *PHASES)}
    samples["step"] = _steps(clock)
    found = {name: Quantiles.of(values) for name, values in samples.items()}
    return {name: [1e3 * q.p20, 1e3 * q.median, 1e3 * q.p80] for name, q in found.items()}


def _steps(clock: PhaseClock) -> list[float]:
    """Seconds of each step: forward, backward and optimizer."""
    return [sum(phases) for phases in zip(*(clock.samples[name] for name in PHASES), strict=True)]


class _RngState:
    """An RNG state that is swapped in while its owner computes."""

    def __init__(self) -> None:
        self.state = self._read()

    @contextmanager
    def mine(self) -> Iterator[None]:
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)

    @staticmethod
    def _read() -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    @staticmethod
    def _write(state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used ({error})") from error
    return device


def _schedule(
    optimizer: torch.optim.Optimizer, settings: Settings
) -> torch.optim.lr_scheduler.LRScheduler:
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR

    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, settings.epochs)
    if settings.schedule == "step":
        return MultiStepLR(optimizer, list(settings.milestones))
    return ConstantLR(optimizer, factor=1.0)
