"""Calibration: a few weight gradients, timed once on a machine, scale the table of its class.

A table was measured on one machine; another one of its class has another clock, other caches and
other memory, and a class that nobody measured may still resemble one. What scaling cannot mend is
found too: then no table is used.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neq_kernels.backends.base import Backend
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.dispatch import cost_model, stopwatch, trial
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.dispatch.tuning_table import directory, file_name, write_whole

logger = logging.getLogger(__name__)

SWITCH = "NEQ_KERNELS_CALIBRATE"
# Of one calibration, whatever the machine; no measurement begins after MOST_SECONDS.
MOST_SECONDS = 1.5
_ROUNDS = 3
# What the slowest of a call's rounds may take of the fastest one's, typically: where it is more,
# something else is running.
_STEADY = 1.3
# How far, in logarithms, times may typically lie from the scaled table (a factor of 1.6): tables
# that serve lie within 0.3.
MOST_MISFIT = 0.47
# A group's scale is drawn towards 1 as if it had been seen so often more: each time is a little
# off.
_PRIOR = 0.5
_FORMAT = 1

# (rows, inputs, outputs) of linear layers.
_LINEAR = ((3528, 192, 192), (512, 384, 1536), (128, 1536, 768), (2048, 384, 192))
# (images, inputs, size, outputs, kernel, stride, padding, groups) of convolutions.
_CONVOLUTIONS = (
    # 3x3 and the like
    (128, 16, 32, 16, 3, 1, 1, 1),
    (128, 32, 16, 32, 3, 1, 1, 1),
    (8, 128, 16, 128, 3, 1, 1, 1),
    (8, 96, 32, 192, 2, 2, 0, 1),
    (16, 256, 8, 512, 3, 2, 1, 1),
    # depthwise
    (32, 88, 16, 88, 3, 1, 1, 88),
    (32, 72, 32, 72, 3, 2, 1, 72),
    (32, 144, 8, 144, 5, 1, 2, 144),
    (8, 768, 4, 768, 7, 1, 3, 768),
    # few inputs
    (8, 3, 128, 96, 4, 4, 0, 1),
    (32, 3, 128, 16, 3, 2, 1, 1),
    (128, 3, 32, 16, 3, 1, 1, 1),
    # 1x1
    (32, 72, 16, 24, 1, 1, 0, 1),
    (8, 64, 32, 64, 1, 1, 0, 1),
    (8, 128, 16, 512, 1, 1, 0, 1),
    (32, 96, 4, 576, 1, 1, 0, 1),
)
_SHARES = (0.5, 0.1)

# Seconds of weight gradients, by problem, number of active channels and strategy.
Times = Mapping[tuple[Problem, int, Strategy], float]


@dataclass(frozen=True)
class Calibration:
    """What is known of a machine.

    Attributes:
        table: the table of costs that is used; None: none fits.
        scales: by group, how much longer this machine takes.
        misfit: how far its times typically lie from the scaled table, in logarithms; None where
            nothing was measured.
    """

    table: str | None
    scales: Mapping[str, float]
    misfit: float | None = None

    def model(self) -> CostModel:
        """The costs to choose by."""
        if self.table is None:
            return CostModel()
        return CostModel.of_class(self.table).scaled(self.scales)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_dict` returned.

        Raises:
            ValueError: something else.
        """
        try:
            table, misfit = saved["table"], saved["misfit"]
            scales = {str(name): float(scale) for name, scale in saved["scales"].items()}
            known = table is None or (isinstance(table, str) and CostModel.of_class(table).name)
            if not known or not all(0 < s < math.inf for s in scales.values()):
                raise ValueError(f"table {table!r}, scales {scales}")
            return cls(table, scales, None if misfit is None else float(misfit))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"calibration: expected what to_dict() returned, got {saved!r} ({error})"
            ) from error


def canonical() -> list[tuple[Problem, tuple[int, ...]]]:
    """The weight gradients of a calibration, each with its numbers of active channels."""
    problems = [Problem((t, c), (k, c), None, False, torch.float32) for t, c, k in _LINEAR]
    for images, c, size, k, kernel, stride, padding, groups in _CONVOLUTIONS:
        geometry = ConvGeometry((stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), groups)
        sizes = (images, c, size, size), (k, c // groups, kernel, kernel)
        problems += [Problem(*sizes, geometry, last, torch.float32) for last in (False, True)]
    return [(p, tuple(max(1, round(s * p.neurons)) for s in _SHARES)) for p in problems]


def measure(backend: Backend, most_seconds: float = MOST_SECONDS) -> Times:
    """Time the canonical weight gradients, in an order that sees every kind early, until all are
    done or time is up; nothing at all where the machine is not steady."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _measured(backend, most_seconds)


def _measured(backend: Backend, most_seconds: float) -> Times:
    start = time.perf_counter()
    times: dict[tuple[Problem, int, Strategy], float] = {}
    spread: list[float] = []
    problems = canonical()
    for problem, counts in problems[::2] + problems[1::2]:
        if time.perf_counter() - start > most_seconds:
            break
        tensors = trial.operands(problem, random=False)
        calls = {}
        for n in counts:
            channels = trial.spread(n, problem.neurons)
            for strategy in backend.strategies(problem):
                if strategy != Strategy.DENSE or n == counts[0]:
                    calls[problem, n, strategy] = trial.wgrad(
                        problem, backend, KernelChoice(strategy), *tensors, channels
                    )
        samples = stopwatch.in_turns(calls, 0.0, least_rounds=_ROUNDS)
        times |= {call: min(seconds) for call, seconds in samples.items()}
        spread += [max(seconds) / min(seconds) for seconds in samples.values()]
    return times if spread and statistics.median(spread) <= _STEADY else {}


def fitted(times: Times, tables: Sequence[CostModel], own: str = "") -> Calibration:
    """The table that fits such times best, scaled; where none does, none.

    Args:
        own: the table of the machine's class, which is preferred where it fits.
    """
    found = [Calibration(table.name, *_scales(times, table)) for table in tables]
    found.sort(key=lambda each: (each.table != own or _is_off(each), each.misfit))
    if not found or _is_off(found[0]):
        return Calibration(None, {}, found[0].misfit if found else None)
    return found[0]


def _is_off(known: Calibration) -> bool:
    return known.misfit is None or known.misfit > MOST_MISFIT


def _scales(times: Times, table: CostModel) -> tuple[dict[str, float], float]:
    """By group, how much longer the machine takes than the table says; and how far the times
    typically lie from the scaled table, in logarithms."""
    off: dict[str, list[float]] = defaultdict(list)
    for (problem, n, strategy), measured in times.items():
        expected = table.seconds(problem, n, strategy)
        if expected is not None and expected > 0:
            off[cost_model.group(problem, strategy)].append(math.log(measured / expected))
    if not off:
        return {}, math.inf
    # A faster clock is no reason to doubt the table.
    common = statistics.median(statistics.median(values) for values in off.values())
    scales = {
        name: common + sum(v - common for v in values) / (len(values) + _PRIOR)
        for name, values in off.items()
    }
    left = [value - scales[name] for name, values in off.items() for value in values]
    misfit = math.sqrt(sum(x * x for x in left) / len(left))
    return {name: math.exp(scale) for name, scale in sorted(scales.items())}, misfit


class CalibrationFile:
    """Where the calibration of a machine is kept.

    Args:
        measured_with: what it holds for.
    """

    def __init__(self, measured_with: Mapping[str, Any]) -> None:
        self._measured_with = dict(measured_with)
        self.path = directory() / file_name("calibration", self._measured_with)
        self._is_newer = self._has_warned = False

    def read(self) -> Calibration | None:
        """What an earlier process found out; None if there is nothing that can be used."""
        try:
            saved = json.loads(self.path.read_text())
            self._is_newer = saved["format"] > _FORMAT
            if saved["format"] != _FORMAT or saved["measured_with"] != self._measured_with:
                raise ValueError("it was measured with something else")
            return Calibration.from_dict(saved["calibration"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self._has_warned:
                logger.warning("the calibration %s is ignored: %s", self.path, error)
            self._has_warned = True
            return None

    def write(self, calibration: Calibration) -> None:
        """Keep it for later processes, if a file can be written (a warning says where not); not
        over one of a newer version."""
        about = {"format": _FORMAT, "measured_with": self._measured_with}
        if not self._is_newer:
            text = json.dumps({**about, "calibration": calibration.to_dict()}, indent=1)
            write_whole(self.path, text)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no other process calibrates now; none begins within it."""
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
        except (ImportError, OSError):
            yield True  # whoever cannot write a file cannot read one of another process either
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True


def is_asked_for() -> bool:
    """Whether ``NEQ_KERNELS_CALIBRATE`` allows it.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    asked = os.environ.get(SWITCH) or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {asked!r}")
    return asked == "1"


def is_busy() -> bool:
    """Whether more is running than the machine has cores."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except OSError:
        return False
