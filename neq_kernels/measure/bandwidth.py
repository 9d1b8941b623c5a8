"""How fast memory can be read: the floor under every kernel that reads its operands once."""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

BUFFER_BYTES = 2**28
TRIALS = 15


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second of the fastest of a few ``sum``s over 256 MiB of float32, far more than any
    cache holds, with the threads PyTorch computes with."""
    # Ones: pages of zeros may all be the same page.
    buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    timer = Timer("buffer.sum()", globals={"buffer": buffer}, num_threads=torch.get_num_threads())
    return BUFFER_BYTES / min(timer.timeit(1).mean for _ in range(TRIALS))
