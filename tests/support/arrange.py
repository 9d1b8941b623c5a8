"""Tensors in every kind of memory layout, orders of active channels, and numbers of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSE = ("contiguous", "channels_last", "permuted")
ANY = (*DENSE, "every_other", "expanded")

seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return values.mul(4).to(dtype)


def arranged(tensor: Tensor, kind: str, seed: int = 0) -> Tensor:
    """The same values (except for "expanded") with other strides."""
    if kind == "channels_last" and tensor.dim() >= 3:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "permuted":
        order = torch.randperm(tensor.dim(), generator=generator(seed))
        return tensor.permute(*order).contiguous().permute(*order.argsort())
    if kind == "every_other":
        wide = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
        return wide[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)].copy_(tensor)
    if kind == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


def order_of(k: int, n: int, seed: int) -> Tensor:
    """``n`` random active channels ascending, then the frozen ones ascending."""
    shuffled = torch.randperm(k, generator=generator(seed))
    return torch.cat([shuffled[:n].sort().values, shuffled[n:].sort().values])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """For comparisons that tell -0 from 0 and one NaN from another."""
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(word)


def assert_as_precise_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, largest: float = 0.0
) -> None:
    """Error at most twice that of torch's own result in this precision, plus one rounding. In
    float64, where torch is the oracle, 1e-13 of the largest number.

    Args:
        exact: in float64.
        largest: the largest number that had to be rounded on the way, when it is not in ``exact``:
            of a sum that cancels, the sum of the magnitudes.
    """
    assert ours.dtype == torchs.dtype
    assert ours.shape == torchs.shape == exact.shape
    if not exact.numel():
        return
    largest = max(largest, float(exact.abs().max()))
    error = float((ours.double() - exact).abs().max())
    allowed = 2 * float((torchs.double() - exact).abs().max())
    allowed += largest * (1e-13 if ours.dtype == torch.float64 else torch.finfo(ours.dtype).eps / 2)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
