"""What the checks of ``neq doctor`` share: their result, masks, operands and distances."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neq_kernels.dispatch.selection import selector

ORACLE = "reference"
ANY = "any"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT64_TOLERANCE = 1e-12
# Float16 cannot hold the usual one.
FLOAT16_EPS = 1e-4
SEED = 2022


@dataclass(frozen=True)
class Check:
    """One op on one backend and device. ``failures`` says which cases were wrong, and how."""

    op: str
    backend: str
    device: str
    cases: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def about(self) -> tuple[str, str, str]:
        """Op, backend and device."""
        return self.op, self.backend, self.device


OPS = (
    *("linear_backward", "conv_backward", "channel_similarity"),
    *("SGD row step", "Adam row step", "AdamW row step"),
)


def usable() -> Iterator[tuple[str, str]]:
    """Every (backend, device type) of this machine that can be used, but the oracle itself."""
    for backend, device in itertools.product(selector.backends, device_types()):
        if backend != ORACLE and selector.why_not(backend, device) is None:
            yield backend, device


def device_types() -> list[str]:
    """The device types that PyTorch can use here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def masks(k: int) -> dict[str, list[int]]:
    return {
        "none": [],
        "one": [k - 1],
        "a run": list(range(1, 1 + k // 2)),
        "scattered": list(range(0, k, 2)),
        "all": list(range(k)),
    }


def leaf(shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)
    if channels_last and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    return tensor


def coarse(values: Tensor) -> Tensor:
    """Quarters: their products have sums that float32 holds exactly, in whatever order."""
    return (values * 4).round() / 4


def distance(a: Tensor, b: Tensor) -> float:
    """In the maximum norm; NaN if either holds one."""
    return largest(a.double().cpu() - b.double().cpu())


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
