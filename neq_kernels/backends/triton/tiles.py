"""How the kernels cut their work, and with what precision they multiply."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
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
# Above so many active neurons the product spared by gathering first is expected to be worth the
# copies.
_MOST_GATHERED = 64

# What a tensor descriptor describes starts, and each row of it, at a multiple of so many bytes.
DESCRIPTOR_ALIGNMENT = 16

# Bytes of shared memory that one program may have.
MOST_SHARED = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
    "gfx1100": 64 << 10,
}


@dataclass(frozen=True)
class Tiles:
    """Neurons, columns and positions of one step of a program, and how it is compiled.

    ``packed``: the active columns of dY are gathered before the product, not within it.
    """

    block_n: int
    block_c: int
    block_t: int
    warps: int
    stages: int
    packed: bool = False

    @classmethod
    def of(cls, settings: Sequence[int]) -> Tiles:
        """The inverse of ``settings``."""
        block_n, block_c, block_t, warps, stages, packed = settings
        return cls(block_n, block_c, block_t, warps, stages, bool(packed))

    @property
    def settings(self) -> tuple[int, ...]:
        """As numbers, for a table."""
        return tuple(map(int, astuple(self)))

    def shared_memory(self, dtype: torch.dtype) -> int:
        """Bytes that the operands of all steps under way take, of one program."""
        step = (self.block_n + self.block_c) * self.block_t * dtype.itemsize
        return step * self.stages


def choices(
    n: int,
    c: int,
    dtype: torch.dtype,
    how: str,
    arch: str,
    *,
    scattered: bool = False,
    described: bool = False,
) -> tuple[Tiles, ...]:
    """Tiles worth trying for n active neurons with c weights each: first the one to take where
    nothing was measured; none needs more shared memory than there is.

    Args:
        dtype: of the operands.
        how: they are multiplied, see ``precision``.
        arch: of the GPU, see ``architecture``.
        scattered: neighbours of neither operand lie side by side in memory: every element has an
            address of its own, in a register.
        described: tensor descriptors can say how the operands lie in memory.
    """
    first = _first_choice(n, c, dtype, how, arch, scattered)
    found = [first]
    if first.block_c > 64:
        found.append(replace(first, block_c=64, warps=4 if first.block_n < 128 else first.warps))
    if first.block_n > 32:
        found.append(replace(first, block_n=first.block_n // 2, warps=4))
    if first.stages > 1 and not scattered:
        found.append(replace(first, stages=first.stages + 1))
    if described and n > _MOST_GATHERED // 2 and _has_descriptors(arch):
        block_n = 64 if n <= 64 else 128
        packed = [Tiles(block_n, 128, 64, 4, 3, True), Tiles(block_n, 256, 64, 8, 3, True)]
        found = packed + found if n > _MOST_GATHERED else found + packed
    most = MOST_SHARED.get(arch, min(MOST_SHARED.values()))
    return tuple(tiles for tiles in found if tiles.shared_memory(dtype) <= most)


def _first_choice(
    n: int, c: int, dtype: torch.dtype, how: str, arch: str, scattered: bool
) -> Tiles:
    """As large as registers allow."""
    is_amd, is_rdna = arch.startswith("gfx"), arch.startswith("gfx1")
    most = 128 >> ((dtype == torch.float32) + scattered + is_rdna)
    block_n = 16
    while block_n < min(n, most):
        block_n *= 2
    if dtype == torch.float32 and how == "ieee":  # no tensor core: threads hold operands
        return Tiles(block_n, 64, 16, 8 if block_n == 64 else 4, 1 if is_amd else 3)
    if scattered:
        return Tiles(block_n, 64, 32, 4, 2)
    block_c = 64 if c <= 64 else 128
    block_t = 64 if block_n == 16 else 32
    # Blackwell's tensor cores add up outside of the registers: half the threads will do.
    has_tensor_memory = arch.startswith("sm_10")
    warps = 8 if block_n * block_c >= (128 if has_tensor_memory else 64) * 128 else 4
    return Tiles(block_n, block_c, block_t, warps, 2 if is_amd else 3)


def can_describe(row_stride: int, dtype: torch.dtype) -> bool:
    """Whether a tensor descriptor can say how a matrix of such rows lies in memory, and the product
    reads it as it is."""
    return dtype.itemsize == 2 and row_stride * dtype.itemsize % DESCRIPTOR_ALIGNMENT == 0


def _has_descriptors(arch: str) -> bool:
    """Whether the GPU copies tiles that a descriptor describes."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def splits_for(tiles: Tiles, n: int, c: int, t: int, device: torch.device) -> int:
    """Into how many parts the reduction over t is cut: the fewer the rows, the more."""
    programs = -(-max(1, n) // tiles.block_n) * -(-c // tiles.block_c)
    useful = -(-_WAVES * processors(device) // programs)
    most = t // (_LEAST_TILES * tiles.block_t)
    return max(1, min(useful, most))


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
