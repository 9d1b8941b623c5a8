"""What stands in for a GPU: a clock that is told how long things take, an energy counter."""

from __future__ import annotations

import random
import types

import torch

from benchmarks.common.gpu_device import Lab
from neq_kernels.dispatch.selection import selector

NAME = "FAKE GPU OF A TEST"


class FakeClock:
    """A device with a queue. Calls say what they take by :meth:`work`; a flush takes a time of its
    own, and a call that no flush preceded takes half of it only. ``log`` has what was done."""

    FLUSH = 1e-3

    def __init__(self) -> None:
        self.now, self.log, self.cold, self.pending = 0.0, [], False, 0
        self.broken = False

    def flush(self) -> None:
        self.log.append("flush")
        self.now += self.FLUSH
        self.cold = True

    def work(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.now += seconds if self.cold else seconds / 2
        self.cold = False

    def mark(self) -> float:
        self.pending += 1
        return self.now

    def seconds(self, start: float, end: float) -> float:
        assert self.pending == 0, "a mark is read that the device has not passed"
        return end - start

    def synchronize(self) -> None:
        self.pending = 0
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


class TickingClock(FakeClock):
    """For real calls on CPU tensors: each mark is a little later than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(0)

    def mark(self) -> float:
        self.now += 1e-4 * (1 + self._random.random())
        return super().mark()


def lab(clock: FakeClock | None = None, backend: str = "cpu") -> Lab:
    assert selector.backends[backend].unavailable() is None  # loads it, as on a GPU
    return Lab(torch.device("cpu"), clock or TickingClock(), backend)


def facts() -> dict[str, object]:
    return {
        "device": NAME,
        "capability": "0.0",
        "memory_gib": 0,
        "multiprocessors": 0,
        "l2_mib": 0,
        "torch": torch.__version__,
        "triton": "none",
        "cuda": "none",
        "cudnn": "none",
        "driver": "none",
        "tf32": {"matmul": False, "conv": True},
    }


class FakeNvml(types.SimpleNamespace):
    """A GPU that draws a joule between two readings of its counter."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        super().__init__(millijoules=0, per_reading=1000)

    def nvmlInit(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return b"1.2.3"

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-00000000-aaaa-{handle}"

    def nvmlDeviceGetName(self, handle):
        return NAME

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += self.per_reading
        return self.millijoules
