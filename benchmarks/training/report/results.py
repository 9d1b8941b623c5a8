"""What a run's files say about time, work and savings. Nothing here measures; everything reads."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.training.run_folder import RunFolder
from neq_kernels.measure.timing import PHASES

TRAIN_PHASES = ("data", *PHASES)
MEDIAN = 1  # position in [p20, median, p80]


@dataclass(frozen=True)
class Result:
    """The files of one finished or interrupted run."""

    name: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    epochs: list[dict[str, Any]]
    profile: dict[str, Any] | None

    @classmethod
    def read(cls, folder: RunFolder, name: str | None = None) -> Result:
        """Raises RunError if the folder holds no readable run."""
        config = folder.config()
        profile = folder.read_json("profile.json") if folder.has("profile.json") else None
        name = name or config["settings"]["policy"]
        return cls(name, config["settings"], config["machine"], folder.metrics(), profile)

    @property
    def policy(self) -> str:
        return str(self.settings["policy"])

    def step_ms(self, epoch: int, phase: str = "step") -> float:
        """Median milliseconds of a step (forward, backward, optimizer) or one phase of it."""
        return float(self.epochs[epoch]["step_ms"][phase][MEDIAN])

    def mean_step_ms(self, phase: str = "step") -> float:
        """Mean over the epochs of their median steps."""
        return fmean(self.step_ms(epoch, phase) for epoch in range(len(self.epochs)))

    def step_spread(self) -> float:
        """How far a step's p20 and p80 lie apart, over its median; mean over the epochs."""
        steps = (record["step_ms"]["step"] for record in self.epochs)
        return fmean((high - low) / middle for low, middle, high in steps)

    def seconds(self, phase: str) -> float:
        return sum(float(record["seconds"][phase]) for record in self.epochs)

    def elapsed(self) -> list[float]:
        """Seconds of training (controller included, evaluation not) up to each epoch's end."""
        total, ends = 0.0, []
        for record in self.epochs:
            total += sum(record["seconds"][phase] for phase in (*TRAIN_PHASES, "controller"))
            ends.append(total)
        return ends

    def flops(self, epoch: int) -> tuple[float, float]:
        """FLOPs of one image: ``(paper, executed)`` conventions."""
        work = self.epochs[epoch]["flops"]
        return work["paper"], work["forward"] + work["dgrad"] + work["wgrad"]

    def joules(self) -> float | None:
        values = [record["joules"] for record in self.epochs]
        return None if None in values else sum(values)


@dataclass(frozen=True)
class Comparison:
    """One policy against the dense run that took turns with it in the same process."""

    run: Result
    dense: Result

    @property
    def epochs(self) -> int:
        return min(len(self.run.epochs), len(self.dense.epochs))

    def speedup(self, epoch: int) -> float:
        """Dense step time over the run's: the median ratio of steps taken in turn, so that drift of
        the machine cancels; of runs that did not take turns by steps, the ratio of medians."""
        return self.speedup_quantiles(epoch)[MEDIAN]

    def speedup_quantiles(self, epoch: int) -> list[float]:
        """``[p20, median, p80]`` of :meth:`speedup`; all the same without turns by steps."""
        ratio = self.dense.step_ms(epoch) / self.run.step_ms(epoch)
        return list(self.run.epochs[epoch].get("speedup", [ratio] * 3))

    def bound(self, epoch: int) -> float | None:
        """The speed-up that this epoch's frozen neurons allow at most, from measured shares."""
        return self.run.epochs[epoch].get("bound")

    def mean_speedup(self) -> float:
        """Dense over run, whole run, controller's time not counted."""
        return self._dense_ms() / self._run_ms()

    def mean_bound(self) -> float | None:
        bounds = [self.bound(epoch) for epoch in range(self.epochs)]
        if None in bounds or not bounds:
            return None
        steps = [self.dense.step_ms(epoch) for epoch in range(self.epochs)]
        return sum(steps) / sum(ms / b for ms, b in zip(steps, bounds, strict=True) if b)

    def saved_in_steps(self) -> float:
        """Seconds saved in forward, backward and optimizer, by the epochs' speed-ups."""
        return (self._dense_ms() - self._run_ms()) / 1e3

    def saved(self) -> float:
        """Seconds saved with the controller's own time counted in; negative when it cost time."""
        return self.saved_in_steps() - self.run.seconds("controller")

    def dense_seconds(self) -> float:
        return self._dense_ms() / 1e3

    def _dense_ms(self) -> float:
        return sum(r["steps"] * self.dense.step_ms(i) for i, r in self._records())

    def _run_ms(self) -> float:
        return sum(r["steps"] * self.dense.step_ms(i) / self.speedup(i) for i, r in self._records())

    def _records(self) -> list[tuple[int, dict[str, Any]]]:
        return list(enumerate(self.run.epochs[: self.epochs]))
