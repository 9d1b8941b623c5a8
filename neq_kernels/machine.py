"""What a figure was measured with. Every result carries it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")

OTHER = "other"
# By the instructions that kernels differ by, the widest first.
_CLASSES = {
    "x86-avx512-amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_tile", "amx_bf16"},
    "x86-avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "x86-avx2": {"avx2", "fma"},
}
CPU_CLASSES = (*_CLASSES, OTHER)


@dataclass(frozen=True)
class Machine:
    """``threads`` are the ones PyTorch computes with; ``accelerator`` is None on a CPU-only
    machine; ``date`` is UTC, ISO 8601; ``cpu_class`` is :func:`cpu_class`'s, empty in results of
    version 0.1."""

    cpu: str
    cores: int
    threads: int
    instructions: str
    accelerator: str | None
    system: str
    python: str
    torch: str
    date: str
    cpu_class: str = ""

    def to_dict(self) -> dict[str, str | int | None]:
        """Ready for JSON."""
        return asdict(self)


def machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu_class=cpu_class(),
    )


def cpu_class() -> str:
    """The class of this machine's CPU, one of ``CPU_CLASSES``: what was measured on one holds for
    others of its class."""
    flags = set(_cpuinfo("flags").split())
    return next((name for name, needed in _CLASSES.items() if needed <= flags), OTHER)


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """Of the first CPU that Linux tells about; empty elsewhere."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
