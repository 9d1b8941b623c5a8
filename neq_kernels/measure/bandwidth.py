"""How fast memory can be read and written: the floor under every kernel, which has to read its
operands and to write its result once."""

from __future__ import annotations

import torch

BUFFER_BYTES = 2**28
TRIALS = 15


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second of the fastest of a few ``sum``s over 256 MiB of float32, far more than any
    cache holds, with the threads PyTorch computes with."""
    return _bandwidth("buffer.sum()", device)


def write_bandwidth(device: torch.device | str = "cpu") -> float:
    """As :func:`read_bandwidth`, of ``zero_``."""
    return _bandwidth("buffer.zero_()", device)


def _bandwidth(statement: str, device: torch.device | str) -> float:
    # Here, as it warns of a missing GPU where there is a CUDA compiler.
    from torch.utils.benchmark import Timer

    # Ones: pages of zeros may all be the same page.
    buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    timer = Timer(statement, globals={"buffer": buffer}, num_threads=torch.get_num_threads())
    return BUFFER_BYTES / min(timer.timeit(1).mean for _ in range(TRIALS))
