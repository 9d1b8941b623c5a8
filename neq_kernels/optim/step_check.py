"""The whole-step check: are steps faster with the chosen kernels than with PyTorch's dense ones?

Kernels are chosen layer by layer, from times of single calls. What that leaves out (caches, Python,
the allocator) shows in whole steps alone. Opt-in, by ``NEQ_KERNELS_STEP_CHECK=1``.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.tuning_table import MEASURE_VARIABLE
from neq_kernels.optim.dense_serving import DenseServing
from neq_kernels.optim.forward_watch import ForwardWatch
from neq_kernels.optim.ownership import Ownership
from neq_kernels.process_group import in_process_group

logger = logging.getLogger(__name__)

VARIABLE = "NEQ_KERNELS_STEP_CHECK"
THRESHOLD = 0.97
LEAST_RATIOS, MOST_RATIOS = 8, 16
MOST_DENSE_SHARE = 0.01  # of the steps since the optimizer was attached
LEAST_STEPS_BETWEEN_CHANGES = 200
# After a change: until contests of kernels are over, which slow steps down. Some never are, since
# their layer does not run.
WARMUP_STEPS, MOST_STEPS_OF_CONTESTS = 5, 200
_ERROR = 0.05


def is_asked_for() -> bool:
    """Whether the user asked for the check.

    Raises:
        ValueError: ``NEQ_KERNELS_STEP_CHECK`` is neither 0 nor 1.
    """
    choice = os.environ.get(VARIABLE) or "0"
    if choice not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {choice!r}")
    return choice == "1"


class StepClock(Protocol):
    """Nobody waits for it."""

    def mark(self) -> Any:
        """A moment: now, on a GPU when what is queued so far is done."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """Between two marks, None while one of them has not come."""


class HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """Events of PyTorch's current stream on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        if not (start.query() and end.query()):
            return None
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


class StepCheck:
    """Compares steps, from the first forward of a converted layer to the end of the optimizer's
    step, after each change of the active sets.

    A trial is three steps, by the chosen kernels, by the dense ones and by the chosen ones again:
    one ratio dense/chosen, in which a steady drift does not show. The first trial plans and loads,
    and is not counted. Trials go on, as the share of dense steps allows, until the interval of the
    median ratio is clear of the threshold.

    Args:
        ownership: of the model.
        serving: lets dense kernels serve it.

    Attributes:
        dense_steps: how many steps dense kernels have served for a comparison.
    """

    def __init__(self, ownership: Ownership, serving: DenseServing) -> None:
        self._ownership, self._serving = ownership, serving
        self.dense_steps = self._steps = 0
        self._version: int | None = None
        self._last_change = 0
        # Steps between changes: the mean over the past, in which the last one counts half.
        self._usual = math.inf
        self._logged: set[str] = set()
        self._watch: ForwardWatch | None = None
        self._start: Any = None
        self._trial: list[tuple[Any, Any]] = []
        self._begin_anew()

    def step_ended(self) -> None:
        """The attached optimizer has made a step."""
        self._steps += 1
        if self._version != self._ownership.version:
            self._count_change()
            self._begin_anew()
        elif self._watch is not None:
            self._end_step_of_trial()
        elif self._trial:
            self._judge()
        elif self._may_try():
            self._serving.serve(False)
            layers = [layer for _, layer in self._ownership.layers()]
            self._watch = ForwardWatch(layers, self._forward_begins)

    def stop(self) -> None:
        """Leave no hook, and nothing to dense kernels."""
        self._end_trial()
        self._is_done = True

    def _begin_anew(self) -> None:
        self._end_trial()
        self._is_done = self._is_warm = False
        self._ratios: list[float] = []

    def _count_change(self) -> None:
        if self._version is not None:  # the first step is no change
            steps = self._steps - self._last_change
            self._usual = steps if math.isinf(self._usual) else (self._usual + steps) / 2
        self._version, self._last_change = self._ownership.version, self._steps

    # --- when ------------------------------------------------------------------------------------

    def _may_try(self) -> bool:
        unchanged = self._steps - self._last_change
        return (
            not self._is_done
            and unchanged >= (MOST_STEPS_OF_CONTESTS if selector.contests else WARMUP_STEPS)
            and self.dense_steps + 1 <= MOST_DENSE_SHARE * self._steps
            and max(self._usual, unchanged) >= LEAST_STEPS_BETWEEN_CHANGES
            and not self._is_off()
        )

    def _is_off(self) -> bool:
        reason = self._reason_against()
        if reason is not None and reason not in self._logged:
            self._logged.add(reason)
            logger.info("step check: off %s", reason)
        return reason is not None

    def _reason_against(self) -> str | None:
        if in_process_group():
            return "under a process group"
        if any(len(anchor.optimizers) > 1 for anchor in self._ownership.anchors):
            return "with several optimizers attached to the model"
        if not selector.context(self._device().type).measures:
            return (
                f"where nothing is measured: with deterministic algorithms, {MEASURE_VARIABLE}="
                "never or a loaded table"
            )
        devices = {p.device for p in self._ownership.parameters}
        if len(devices) > 1 or self._device().type not in ("cpu", "cuda"):
            return f"for parameters on {', '.join(sorted(map(str, devices)))}"
        return None

    # --- trials ----------------------------------------------------------------------------------

    def _forward_begins(self) -> None:
        some = next(iter(self._ownership.parameters))
        if self._start is None and not selector.rehearsal.captures(some):
            self._start = clock_of(self._device()).mark()

    def _end_step_of_trial(self) -> None:
        is_dense = len(self._trial) == 1
        self.dense_steps += is_dense
        if self._start is None or self._is_off():
            # No forward was seen: the layers are compiled, or replayed by a CUDA graph.
            self.stop()
            return
        self._trial.append((self._start, clock_of(self._device()).mark()))
        self._start = None
        if len(self._trial) < 3:
            self._serving.serve(not is_dense)
            return
        trial = self._trial
        self._end_trial()
        if self._is_warm:
            self._trial = trial
            self._judge()
        self._is_warm = True

    def _end_trial(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._serving.serve(False)
        self._watch = self._start = None
        self._trial = []

    def _judge(self) -> None:
        """By the times of the trial that has ended, if they are known by now."""
        clock = clock_of(self._device())
        times = [clock.seconds(*marks) for marks in self._trial]
        known = [seconds for seconds in times if seconds is not None]
        if len(known) < len(times):
            return
        self._trial = []
        before, dense, after = known
        self._ratios.append(dense / math.sqrt(before * after))
        n = len(self._ratios)
        if n < LEAST_RATIOS:
            return
        low, high = interval_of_median(self._ratios)
        self._is_done = high < THRESHOLD or low > THRESHOLD or n >= MOST_RATIOS
        if high < THRESHOLD:
            self._serving.serve(True, by_verdict=True)
            logger.warning(
                "step check: with PyTorch's dense weight gradients a step takes %.3f of its time "
                "(95 %% interval %.3f to %.3f, %d comparisons): they serve until the active "
                "neurons change",
                *(statistics.median(self._ratios), low, high, n),
            )

    def _device(self) -> torch.device:
        return next(iter(self._ownership.parameters)).device


def clock_of(device: torch.device) -> StepClock:
    return EventClock(device) if device.type == "cuda" else HostClock()


def interval_of_median(samples: Sequence[float]) -> tuple[float, float]:
    """The narrowest two order statistics between which the median of what the samples were drawn
    from lies with 95 %, whatever their distribution.

    Raises:
        ValueError: fewer than 6 samples, from which none follows.
    """
    n, ordered = len(samples), sorted(samples)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= _ERROR:
        k += 1
    if k == 0:
        raise ValueError(f"samples: expected at least 6, got {n}")
    return ordered[k - 1], ordered[n - k]
