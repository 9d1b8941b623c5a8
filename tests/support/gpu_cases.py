"""Masks, dtypes and comparisons for kernels that run on a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from neq_kernels.channels import ActiveChannels
from tests.support import oracle

# interpreter (Triton's own), sanitizer (ttsem) or cuda: a real GPU.
EXECUTOR = os.environ.get("NEQ_TRITON_EXECUTOR")

MASKS = {
    "none": lambda k: [],
    "one": lambda k: [k // 2],
    "all": lambda k: list(range(k)),
    "contiguous": lambda k: list(range(k // 4, k // 4 + max(1, k // 3))),
    "random": lambda k: torch.randperm(k, generator=torch.Generator().manual_seed(k))[
        : max(1, k // 2)
    ].tolist(),
}
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16) + (() if EXECUTOR == "interpreter" else (torch.bfloat16,))


def channels(k: int, mask: str) -> ActiveChannels:
    chosen = ActiveChannels(k)
    chosen.set(MASKS[mask](k))
    return chosen


def poison(device: str) -> None:
    """What is allocated next is likely to hold NaN where nothing is written to it."""
    for size in (64, 256, 1024, 4096, 16384):
        torch.full((size,), torch.nan, device=device)


def assert_gradient(actual: Tensor, exact: Tensor, chosen: ActiveChannels, reduction: int) -> None:
    """Frozen rows are exact zeros; the others are within the error of float32 sums and one rounding
    to the result's dtype. ``exact`` is float64."""
    actual = actual.detach().cpu()
    assert not bool(actual.isnan().any())
    assert bool((actual[chosen.frozen] == 0).all())
    error = oracle.largest(actual[chosen.active].double() - exact[chosen.active])
    rounding = torch.finfo(actual.dtype).eps / 2
    sums = torch.finfo(torch.float32).eps * reduction**0.5 * 4
    assert error <= (rounding + sums) * max(1.0, oracle.largest(exact))
