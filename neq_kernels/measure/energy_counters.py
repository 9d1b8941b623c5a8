"""Hardware energy counters: RAPL through Linux's powercap files, NVIDIA GPUs through NVML.

RAPL: kernel documentation, "Power Capping Framework"; AMD processors appear under the same
``intel-rapl`` names. NVML: ``nvmlDeviceGetTotalEnergyConsumption`` (Volta and later).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# No processor package draws more, so a counter read this often cannot wrap twice unseen.
MAX_PACKAGE_WATTS = 2000.0


class CounterError(Exception):
    """A counter cannot be read; the message says why."""


@dataclass(frozen=True)
class Missing:
    """A sensor that cannot be used. ``present`` tells one that exists from one that does not."""

    name: str
    reason: str
    present: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class RaplPackage:
    """One processor package; ``read`` gives joules, modulo ``wraps_at`` (None: unknown).

    Cores, and the platform's sum, would be counted twice; memory is a domain of its own and not in
    it.
    """

    name: str
    file: Path
    wraps_at: float | None

    def read(self) -> float:
        try:
            return int(self.file.read_text()) / 1e6
        except PermissionError:
            raise CounterError(f"permission denied, only root may read {self.file}") from None
        except (OSError, ValueError) as error:
            raise CounterError(f"cannot read {self.file} ({error})") from error


@dataclass(frozen=True)
class NvmlDevice:
    """One NVIDIA GPU, all processes on it together; ``read`` gives joules and never wraps."""

    name: str
    handle: Any
    nvml: Any
    wraps_at: float | None = None

    def read(self) -> float:
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        except self.nvml.NVMLError as error:
            raise CounterError(f"no total energy counter ({error})") from error


Counter = RaplPackage | NvmlDevice
Found = tuple[list[Counter], list[Missing]]


def rapl_packages(powercap: Path = POWERCAP) -> Found:
    """The readable processor packages, and what is missing."""
    counters: list[Counter] = []
    missing: list[Missing] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = _text(zone / "name")
        if zone.name.count(":") != 1 or not name.startswith("package"):
            continue
        wraps_at = _text(zone / "max_energy_range_uj")
        label = f"RAPL {name}"
        counter = RaplPackage(
            label, zone / "energy_uj", int(wraps_at) / 1e6 if wraps_at.isdigit() else None
        )
        _keep_if_readable(counter, counters, missing)
    if not counters and not missing:
        reason = f"no intel-rapl package under {powercap}"
        missing.append(Missing("RAPL", reason, present=False))
    return counters, missing


def nvml_devices(gpus: Sequence[int] | None = None, nvml: Any = None) -> Found:
    """The NVIDIA GPUs (numbered as ``nvidia-smi`` does; None: all) that have a counter, and what is
    missing. ``nvml`` is the ``pynvml`` module, or what stands in for it.

    Raises:
        ValueError: a number in ``gpus`` that no GPU has.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return [], [Missing("NVML", "nvidia-ml-py is not installed", present=False)]
    try:
        nvml.nvmlInit()
        n_gpus = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return [], [Missing("NVML", f"no NVIDIA driver ({error})", present=False)]
    chosen = range(n_gpus) if gpus is None else sorted(set(gpus))
    for index in chosen:
        if not 0 <= index < n_gpus:
            raise ValueError(f"gpus: expected numbers below {n_gpus}, got {index}")
    counters: list[Counter] = []
    missing: list[Missing] = []
    for index in chosen:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            model = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            missing.append(Missing(f"NVML GPU {index}", f"no access ({error})", present=True))
            continue
        model = model.decode() if isinstance(model, bytes) else model
        device = NvmlDevice(f"NVML GPU {index} ({model})", handle, nvml)
        _keep_if_readable(device, counters, missing)
    if not counters and not missing:
        missing.append(Missing("NVML", "no NVIDIA GPU", present=False))
    return counters, missing


def _keep_if_readable(counter: Counter, counters: list[Counter], missing: list[Missing]) -> None:
    try:
        counter.read()
    except CounterError as error:
        missing.append(Missing(counter.name, str(error), present=True))
    else:
        counters.append(counter)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
