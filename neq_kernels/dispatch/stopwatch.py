"""Time of calls on a GPU that finds nothing in its L2 cache, by events on the stream."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

# Writing so much takes the device longer than the host needs to queue a call of several kernels, so
# that none of them waits for the host.
LEAST_FLUSHED_BYTES = 2**30
CACHES = 4
WARMUP = 2


class Clock(Protocol):
    """What measures a device that works through a queue."""

    def flush(self) -> None:
        """Queue writes that leave nothing else in the caches."""

    def mark(self) -> Any:
        """A moment: when everything that is queued so far is done."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, after :meth:`synchronize`."""

    def synchronize(self) -> None:
        """Wait until everything that is queued is done."""


class CudaClock:
    """Events of PyTorch's current stream on a GPU.

    Args:
        device: of type ``cuda``.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        l2 = torch.cuda.get_device_properties(self._device).L2_cache_size
        size = max(LEAST_FLUSHED_BYTES, CACHES * l2)
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=self._device)

    def flush(self) -> None:
        self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def cold_times(
    calls: Mapping[Name, Callable[[], object]],
    clock: Clock,
    seconds: float,
    *,
    least_rounds: int = 7,
    most_rounds: int = 50,
) -> dict[Name, list[float]]:
    """Seconds of each call, round by round, each right after a flush. Every round runs each call
    once, in an order of its own; rounds that compile and choose algorithms are not recorded.

    Args:
        calls: by name.
        seconds: to spend, if ``least_rounds`` do not take longer.

    Raises:
        ValueError: no calls.
    """
    if not calls:
        raise ValueError("calls: expected at least one, got none")
    names = list(calls)
    shuffled = random.Random(0)

    def marks_of_a_round() -> dict[Name, tuple[Any, Any]]:
        marks = {}
        for name in shuffled.sample(names, len(names)):
            clock.flush()
            start = clock.mark()
            calls[name]()
            marks[name] = start, clock.mark()
        return marks

    for _ in range(WARMUP):
        marks_of_a_round()
    start = clock.mark()
    marks_of_a_round()
    end = clock.mark()
    clock.synchronize()
    fitting = int(seconds / max(clock.seconds(start, end), 1e-9))
    rounds = [marks_of_a_round() for _ in range(min(max(fitting, least_rounds), most_rounds))]
    clock.synchronize()
    return {name: [clock.seconds(*marks[name]) for marks in rounds] for name in names}


def in_turns(
    calls: Mapping[Name, Callable[[], object]],
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 200,
) -> dict[Name, list[float]]:
    """Seconds of each call, round by round; every round runs each call once, in an order of its
    own: what a call finds in the caches and in the allocator is left there by the one before. One
    round before the first is not recorded."""
    names = list(calls)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    shuffled = random.Random(0)
    start = time.perf_counter()
    for i in range(most_rounds):
        if i >= least_rounds and time.perf_counter() - start > seconds:
            break
        shuffled.shuffle(names)
        for name in names:
            samples[name].append(_seconds(calls[name]))
    return samples


def _seconds(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
