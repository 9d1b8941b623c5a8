"""The GPU that is measured: what it is, its clock, and whether it still answers."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import cli
from benchmarks.common.interrupt import Interrupted
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.stopwatch import Clock, CudaClock

OUT_OF_MEMORY = "out of GPU memory"
UNKNOWN = "unknown"


class DeviceLost(Exception):
    """After a fault, such as an access out of bounds, a process gets no more work done."""


@dataclass(frozen=True)
class Lab:
    """Where and by which clock is measured.

    Attributes:
        backend: the own one that is measured.
        number: how ``nvidia-smi`` numbers the GPU, None where that cannot be told.
        others: own backends that are measured beside it; the last one serves a GPU where
            none was proved right.
    """

    device: torch.device
    clock: Clock
    backend: str
    number: int | None = None
    others: tuple[str, ...] = ("aten",)

    @classmethod
    def on_gpu(cls) -> Lab:
        """The current GPU."""
        device = torch.device("cuda", torch.cuda.current_device())
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        first, *others = own_backends()
        return cls(device, CudaClock(device), first, number_in_nvml(uuid), tuple(others))

    def survived(self, failure: Exception) -> str:
        """What to say of a provider that failed.

        Raises:
            DeviceLost: nothing runs on the device any more.
        """
        text = _described(failure)
        try:
            self.clock.synchronize()
        except Exception as fault:
            raise DeviceLost(text) from fault
        self.free()
        return text

    def free(self) -> None:
        """Give memory that is kept for later back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def found() -> bool:
    """Whether PyTorch can use a GPU."""
    return torch.cuda.is_available()


def own_backends() -> list[str]:
    """Those of ours that can be used on this GPU, the default first."""
    kernels = [n for n in selector.for_gpus() if selector.backends[n].unavailable() is None]
    return [*kernels, "aten"]


def _described(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def facts() -> dict[str, Any]:
    """What the figures were measured on and with."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version() or UNKNOWN,
        "driver": driver(),
        "tf32": {operation: allows_tf32(operation) for operation in ("matmul", "conv")},
    }


def allows_tf32(operation: str) -> bool:
    """Whether PyTorch may round float32 in a ``"matmul"`` or a ``"conv"``."""
    backends: Any = torch.backends
    setting = backends.cuda.matmul if operation == "matmul" else backends.cudnn.conv
    return bool(setting.fp32_precision == "tf32")


def driver(nvml: Any = None) -> str:
    """The version of NVIDIA's driver."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
        version = nvml.nvmlSystemGetDriverVersion()
    except Exception:  # no such package, no such driver
        return UNKNOWN
    return version.decode() if isinstance(version, bytes) else str(version)


def number_in_nvml(uuid: str, nvml: Any = None) -> int | None:
    """How ``nvidia-smi`` numbers the GPU that PyTorch knows by ``uuid``: the environment may hide
    others from PyTorch. None where it cannot be told."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            found = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))
            found = found.decode() if isinstance(found, bytes) else found
            if found.removeprefix("GPU-").lower() == uuid.removeprefix("GPU-").lower():
                return index
    except Exception:  # as above
        return None
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def phase_parser(module: str, description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The command line of a part that measures."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (%(default)s)")
    parser.add_argument("--seconds", type=cli.seconds, default=seconds, help="in all (%(default)g)")
    parser.add_argument("--failed", nargs="*", default=[], help="backends that are not measured")
    return parser


def nothing_measured() -> int:
    """Say that there is no GPU; returns the exit code."""
    print(
        "No GPU was found (torch.cuda.is_available() is False). NOTHING was measured, and no file "
        "was written.",
        file=sys.stderr,
    )
    return cli.NO_GPU


def exit_code(name: str, error: Exception) -> int:
    """Of a part that ended early, after saying why."""
    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if isinstance(error, Interrupted):
        return error.exit_code
    return cli.WRONG_RESULT if isinstance(error, DeviceLost) else cli.USER_ERROR
