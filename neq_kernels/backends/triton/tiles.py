"""How the kernels cut their work, and with what precision they multiply."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Operation = Literal["matmul", "conv"]

# Where nobody can be asked (no GPU): an H100's.
_ARCHITECTURE, _PROCESSORS = "sm_90", 132
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
    def of(
        cls, n: int, c: int, dtype: torch.dtype, how: str, arch: str, *, scattered: bool = False
    ) -> Tiles:
        """For n active neurons with c weights each: as large as registers allow.

        Args:
            dtype: of the operands.
            how: they are multiplied, see ``precision``.
            arch: of the GPU, see ``architecture``.
            scattered: neighbours of neither operand lie side by side in memory: every element has
                an address of its own, in a register.
        """
        is_amd, is_rdna = arch.startswith("gfx"), arch.startswith("gfx1")
        most = 128 >> ((dtype == torch.float32) + scattered + is_rdna)
        block_n = 16
        while block_n < min(n, most):
            block_n *= 2
        if dtype == torch.float32 and how == "ieee":  # no tensor core: threads hold operands
            return cls(block_n, 64, 16, 8 if block_n == 64 else 4, 1 if is_amd else 3)
        if scattered:
            return cls(block_n, 64, 32, 4, 2)
        block_c = 64 if c <= 64 else 128
        block_t = 64 if block_n == 16 else 32
        # Blackwell's tensor cores add up outside of the registers: half the threads will do.
        has_tensor_memory = arch.startswith("sm_10")
        warps = 8 if block_n * block_c >= (128 if has_tensor_memory else 64) * 128 else 4
        return cls(block_n, block_c, block_t, warps, 2 if is_amd else 3)


def splits_for(tiles: Tiles, n: int, c: int, t: int, device: torch.device) -> int:
    """Into how many parts the reduction over t is cut: the fewer the rows, the more."""
    programs = -(-max(1, n) // tiles.block_n) * -(-c // tiles.block_c)
    wanted = -(-_WAVES * processors(device) // programs)
    most = t // (_LEAST_TILES * tiles.block_t)
    return max(1, min(wanted, most))


def rectangle(block_t: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of a rectangle of at most block_t (a power of two) pixels, as wide as an
    image where it can be, and how many of them cover all images."""
    columns = min(block_t, 1 << max(0, width - 1).bit_length())
    rows = block_t // columns
    return rows, columns, images * -(-height // rows) * -(-width // columns)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return _PROCESSORS


@functools.cache
def architecture(device: torch.device) -> str:
    """Of the GPU, as compilers call it: ``"sm_90"``, ``"gfx942"``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _ARCHITECTURE
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def is_wide(*tensors: Tensor) -> bool:
    """Whether elements of a tensor lie further apart than 32 bits can say: offsets of 64 bits take
    twice the registers."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
        >= 2**31
        for t in tensors
    )


def precision(operation: Operation, dtype: torch.dtype, arch: str) -> str:
    """Of products: ``"tf32"`` where they are of float32, PyTorch allows it in this operation and
    the GPU has it, else ``"ieee"``."""
    backends: Any = torch.backends
    setting = backends.cuda.matmul if operation == "matmul" else backends.cudnn.conv
    has_it = not arch.startswith("gfx") or arch.startswith("gfx9")
    allowed = dtype == torch.float32 and setting.fp32_precision == "tf32"
    return "tf32" if allowed and has_it else "ieee"
