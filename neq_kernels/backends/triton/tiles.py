"""How the kernels cut their work, and with what precision they multiply."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where nobody can be asked (no GPU): an H100's.
_PROCESSORS = 132
# Programs that each processor is to get, so that the last ones finish together.
_WAVES = 2
# No part of a reduction is to be shorter than this many tiles: each part is written and read again.
_LEAST_TILES = 4


@dataclass(frozen=True)
class Tiles:
    """Neurons, columns and positions of one step of a program, and how it is compiled."""

    block_n: int
    block_c: int
    block_t: int
    warps: int
    stages: int

    @classmethod
    def of(cls, n: int, c: int) -> Tiles:
        """For n active neurons with c weights each."""
        block_n = 16
        while block_n < min(n, 128):
            block_n *= 2
        block_c = 64 if c <= 64 else 128
        large = block_n * block_c >= 64 * 128
        return cls(block_n, block_c, 32 if large else 64, 8 if large else 4, 3)


def splits_for(tiles: Tiles, n: int, c: int, t: int, device: torch.device) -> int:
    """Into how many parts the reduction over t is cut: the fewer the rows, the more."""
    programs = -(-max(1, n) // tiles.block_n) * -(-c // tiles.block_c)
    wanted = -(-_WAVES * processors(device) // programs)
    most = t // (_LEAST_TILES * tiles.block_t)
    return max(1, min(wanted, most))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return _PROCESSORS


def is_wide(*tensors: Tensor) -> bool:
    """Whether elements of a tensor lie further apart than 32 bits can say: offsets of 64 bits take
    twice the registers."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
        >= 2**31
        for t in tensors
    )


def precision(operation: str) -> str:
    """Of products of float32 in a ``"matmul"`` or a ``"conv"``: what PyTorch is allowed there."""
    backends: Any = torch.backends
    setting = backends.cuda.matmul if operation == "matmul" else backends.cudnn.conv
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
