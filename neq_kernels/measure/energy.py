"""Joules of a stretch of work, from the machine's own counters or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from neq_kernels.measure.energy_counters import (
    MAX_PACKAGE_WATTS,
    POWERCAP,
    Counter,
    CounterError,
    Missing,
    nvml_devices,
    rapl_packages,
)

NO_COUNTER = "no energy counter on this machine"


@dataclass(frozen=True)
class DeviceEnergy:
    """One device's part. ``joules`` is None if it was not counted; ``reason`` then says why."""

    name: str
    joules: float | None
    reason: str = ""


@dataclass(frozen=True)
class EnergyReading:
    """What was counted between start and stop.

    Attributes:
        joules: the sum over the devices that ``source`` names; None if nothing could be counted,
            or a counter stopped answering on the way.
        source: which counters, and which devices of the machine are not in the sum; or why there
            is no figure.
        seconds: length of the window. Counters refresh every 20 to 100 ms: use several seconds.
        devices: the parts.
    """

    joules: float | None
    source: str
    seconds: float
    devices: tuple[DeviceEnergy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class EnergyMeter:
    """Counts joules between :meth:`start` and :meth:`stop`, or within a ``with`` block:

    >>> with EnergyMeter() as meter:
    ...     train_one_epoch()
    >>> meter.reading.joules, meter.reading.source

    It counts whole devices, other processes on them included, and never estimates. A GPU in MIG
    mode has one counter for all its instances; that of a GH200 or another superchip may hold the
    whole module, processor and memory included. ``source`` says both. May be used again and again,
    one window at a time.

    Args:
        gpus: NVIDIA GPUs as ``nvidia-smi`` numbers them; None: those that ``CUDA_VISIBLE_DEVICES``
            leaves to this process, all without it.
        powercap: where Linux shows RAPL.
        nvml: stands in for the ``pynvml`` module.

    Raises:
        ValueError: a number in ``gpus`` that no GPU has.
    """

    def __init__(
        self,
        *,
        gpus: Sequence[int] | None = None,
        powercap: Path | str = POWERCAP,
        nvml: Any = None,
    ) -> None:
        packages, no_packages = rapl_packages(Path(powercap))
        devices, no_devices = nvml_devices(gpus, nvml)
        self._counters = [*devices, *packages]
        self._missing = [*no_devices, *no_packages]
        self._window: _Window | None = None
        self._reading: EnergyReading | None = None

    @property
    def counters(self) -> tuple[str, ...]:
        """Names of the counters in use; empty if there are none."""
        return tuple(counter.name for counter in self._counters)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Sensors that are not in use, each with the reason in words."""
        return tuple(self._missing)

    @property
    def reading(self) -> EnergyReading:
        """The last window's. Raises RuntimeError before the first :meth:`stop`."""
        if self._reading is None:
            raise RuntimeError("reading: expected a finished window, call start() and stop() first")
        return self._reading

    @property
    def joules(self) -> float | None:
        """``reading.joules``."""
        return self.reading.joules

    @property
    def source(self) -> str:
        """``reading.source``."""
        return self.reading.source

    def start(self) -> None:
        """Begin a window. Raises RuntimeError if one is open."""
        if self._window is not None:
            raise RuntimeError("start: this meter is already running, call stop() first")
        _finish_device_work()
        self._window = _Window(self._counters)

    def stop(self) -> EnergyReading:
        """End the window. Raises RuntimeError if none is open."""
        if self._window is None:
            raise RuntimeError("stop: this meter is not running, call start() first")
        _finish_device_work()
        window, self._window = self._window, None
        seconds, devices = window.close()
        self._reading = self._summary(seconds, devices)
        return self._reading

    def __enter__(self) -> EnergyMeter:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _summary(self, seconds: float, counted: list[DeviceEnergy]) -> EnergyReading:
        unreadable = [missing for missing in self._missing if missing.present]
        devices = (
            *counted,
            *(DeviceEnergy(missing.name, None, missing.reason) for missing in unreadable),
        )
        lost = [device for device in counted if device.joules is None]
        not_counted = "; ".join(map(str, unreadable))
        joules = None
        if lost:
            source = "; ".join(f"{device.name} was lost: {device.reason}" for device in lost)
        elif counted:
            joules = sum(device.joules for device in counted if device.joules is not None)
            source = ", ".join(device.name for device in counted)
            source += f"; not counted: {not_counted}" if unreadable else ""
        else:
            source = f"no readable energy counter ({not_counted})" if unreadable else NO_COUNTER
        return EnergyReading(joules, source, seconds, devices)


class _Window:
    """Running totals of counters, kept fresh by a thread while any of them may wrap."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._totals = [_Total(counter) for counter in counters]
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        ranges = [counter.wraps_at for counter in counters if counter.wraps_at is not None]
        if ranges:
            # Twice per shortest possible lap.
            self._period = min(ranges) / MAX_PACKAGE_WATTS / 2
            self._thread = threading.Thread(target=self._keep_fresh, name="energy", daemon=True)
            self._thread.start()
        self._start = time.perf_counter()

    def close(self) -> tuple[float, list[DeviceEnergy]]:
        seconds = time.perf_counter() - self._start
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        return seconds, [total.advance().result() for total in self._totals]

    def _keep_fresh(self) -> None:
        while not self._closed.wait(self._period):
            for total in self._totals:
                total.advance()


class _Total:
    """Joules of one counter since it was made. A counter that failed once is lost for good."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._joules = 0.0
        self._lost = ""
        self._last = 0.0
        self._last = self._read()

    def advance(self) -> _Total:
        now = self._read()
        if not self._lost:
            self._joules += self._step(now)
            self._last = now
        return self

    def result(self) -> DeviceEnergy:
        joules = None if self._lost else self._joules
        return DeviceEnergy(self._counter.name, joules, self._lost)

    def _read(self) -> float:
        try:
            return self._counter.read()
        except CounterError as error:
            self._lost = self._lost or str(error)
            return self._last

    def _step(self, now: float) -> float:
        step = now - self._last
        if step >= 0:
            return step
        if self._counter.wraps_at is None:
            self._lost = "its counter started again"
            return 0.0
        return step + self._counter.wraps_at


def _finish_device_work() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
