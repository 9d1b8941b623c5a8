"""Hardware energy counters: RAPL through Linux's powercap files, NVIDIA GPUs through NVML.

RAPL: kernel documentation, "Power Capping Framework"; AMD processors appear under the same
``intel-rapl`` names. NVML: ``nvmlDeviceGetTotalEnergyConsumption`` (Volta and later); which GPUs
by ``CUDA_VISIBLE_DEVICES`` (CUDA programming guide, "CUDA Environment Variables").
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# No processor package draws more, so a counter read this often cannot wrap twice unseen.
MAX_PACKAGE_WATTS = 2000.0
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
# NVIDIA's names of modules that hold a processor beside the GPU.
_SUPERCHIPS = ("GH200", "GB200", "GB300", "GB10")


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
    """The NVIDIA GPUs that have a counter, and what is missing.

    Args:
        gpus: numbers as ``nvidia-smi`` shows them; None: those that ``CUDA_VISIBLE_DEVICES`` leaves
            to this process (numbers, UUIDs or beginnings of them, ``MIG-`` names), all without it.
            Numbers in the variable are taken as ``nvidia-smi``'s too: CUDA counts so with
            ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, or where all GPUs are alike.
        nvml: the ``pynvml`` module, or what stands in for it.

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
    visible = os.environ.get(VISIBLE_DEVICES)
    if gpus is None and visible is not None:
        chosen = dict.fromkeys(_visible(visible, n_gpus, nvml))
    else:
        chosen = dict.fromkeys(range(n_gpus) if gpus is None else sorted(gpus))
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
        about = [_decoded(model), *_counted_too(_decoded(model), handle, nvml)]
        device = NvmlDevice(f"NVML GPU {index} ({', '.join(about)})", handle, nvml)
        _keep_if_readable(device, counters, missing)
    if not counters and not missing:
        hidden = n_gpus and gpus is None
        reason = f"{VISIBLE_DEVICES}={visible} leaves no GPU" if hidden else "no NVIDIA GPU"
        missing.append(Missing("NVML", reason, present=False))
    return counters, missing


def _visible(variable: str, n_gpus: int, nvml: Any) -> Iterator[int]:
    """GPUs that the variable names. As in CUDA the first name that fits none ends the list."""
    for name in filter(None, (part.strip() for part in variable.split(","))):
        index = _index_of(name, n_gpus, nvml)
        if index is None:
            return
        yield index


def _index_of(name: str, n_gpus: int, nvml: Any) -> int | None:
    if name.lstrip("+-").isdigit():
        return int(name) if 0 <= int(name) < n_gpus else None
    if name.startswith("MIG-GPU-"):  # MIG-GPU-<uuid>/<GPU instance>/<compute instance>
        name = name.removeprefix("MIG-").split("/")[0]
    try:
        if name.startswith("MIG-"):
            part = nvml.nvmlDeviceGetHandleByUUID(name)
            handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)
            return int(nvml.nvmlDeviceGetIndex(handle))
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(n_gpus))
        uuids = [_decoded(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except nvml.NVMLError:
        return None
    fitting = [i for i, uuid in enumerate(uuids) if uuid.startswith(name)]
    return fitting[0] if len(fitting) == 1 else None


def _counted_too(model: str, handle: Any, nvml: Any) -> Iterator[str]:
    """What this GPU's counter holds beside the work of this process's device."""
    try:
        in_mig_mode = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (nvml.NVMLError, AttributeError):  # too old for it, the GPU or the library
        in_mig_mode = False
    if in_mig_mode:
        yield "all of its MIG instances together"
    if any(name in model for name in _SUPERCHIPS):
        yield "perhaps the whole module with its processor"


def _decoded(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


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
