"""The example kernels, built and compared with float64."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_on_cpu.build import Replacement
from tests.cuda_on_cpu.emulator import Launch, Library, Mode, Run, build

KERNELS = Path(__file__).parent / "kernels"
CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


@functools.cache
def library(
    name: str, *, checked: bool = True, portable: bool = False, fault: Replacement | None = None
) -> Library:
    return build(
        [KERNELS / name],
        include=[CUDA],
        checked=checked,
        portable=portable,
        replace=[fault] if fault else [],
    )


def line_of(file: str, text: str) -> int:
    """The number of the only line of an example's source that holds this text."""
    found = [
        number
        for number, line in enumerate((KERNELS / file).read_text().splitlines(), start=1)
        if text in line
    ]
    assert len(found) == 1, (text, found)
    return found[0]


def assert_close(actual: Tensor, exact: Tensor) -> None:
    error = (actual.double() - exact).abs().max() / exact.abs().max()
    assert bool(error < 1e-6), f"relative error {error:.1e}"


def product(
    library: Library,
    mode: Mode,
    *,
    by_rows: bool = False,
    shape: tuple[int, int, int] = (72, 104, 136),
    splits: int = 1,
) -> list[Launch]:
    m, n, k = shape
    dtype = torch.bfloat16 if by_rows else torch.float16
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    exact = a.double() @ b.double()
    a, b = (a, b.t().contiguous()) if by_rows else (a.t().contiguous(), b)
    out, parts = torch.full((m, n), torch.nan), torch.full((splits, m, n), torch.nan)
    tickets = torch.full((-(-m // 64) * -(-n // 64),), 7, dtype=torch.int32)
    run = Run(library, mode, {"a": a, "b": b}, {"out": out, "parts": parts, "tickets": tickets})
    run.call("run_product", by_rows, a, b, out, parts, tickets, m, n, k, splits)
    assert_close(out, exact)
    assert not tickets.any()
    return run.launches


def row_sums(library: Library, mode: Mode, rows: int = 10, columns: int = 200) -> list[Launch]:
    x = torch.randn(rows, columns)
    sums, rounded = torch.full((rows,), torch.nan), torch.zeros(rows, 2, dtype=torch.int32)
    total, positive = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    written = {"sums": sums, "rounded": rounded, "total": total, "positive": positive}
    run = Run(library, mode, {"x": x}, written)
    run.call("run_row_sums", x, *written.values(), rows, columns)
    exact = x.double().sum(1)
    assert_close(sums, exact)
    assert_close(total, exact.sum())
    assert positive.item() == (exact > 0).sum()
    half, bfloat16 = rounded.to(torch.int16).unbind(1)
    assert torch.equal(half.view(torch.float16), sums.half())
    assert torch.equal(bfloat16.view(torch.bfloat16), sums.bfloat16())
    return run.launches


def copy_16(library: Library, mode: Mode, n_chunks: int = 100) -> list[Launch]:
    given, out = torch.randn(4 * n_chunks), torch.full((4 * n_chunks,), torch.nan)
    run = Run(library, mode, {"from": given}, {"to": out})
    run.call("run_copy_16", given, out, n_chunks)
    assert torch.equal(given, out)
    return run.launches
