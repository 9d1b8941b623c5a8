"""Faults planted into the sources of the products are caught by the comparisons of the other
tests, or by the emulator, in one mode at least."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neq_kernels.backends.problem import ConvGeometry

# Their checks are run over the faults.
from tests.backends.cuda import test_pack, test_wgrad
from tests.cuda_on_cpu.emulator import MODES, EmulationError
from tests.support.cuda_cases import library, without
from tests.support.gpu_cases import channels

GATHERED = partial(test_wgrad.check_linear, 100, 32, 72, torch.float16, "random", parts=2)
PACKED = partial(GATHERED, packed=True)
PLAIN = partial(GATHERED.func, 70, 24, 40, torch.float32, "random", parts=2)


def conv(**how):
    for name in ("dilated", "plain"):
        size, kernel, (stride, padding, dilation) = test_wgrad.CONVS[name]
        geometry = ConvGeometry(stride, padding, dilation, False, (0, 0), 1)
        test_wgrad.check_conv(size, 24, kernel, geometry, torch.float16, "random", parts=2, **how)


def few_rows(**how):
    """Narrow and wide rectangles, elements of dY that are two steps and one step under way."""
    chosen = channels(16, "random")
    for size, parts in (((2, 24, 9, 17), 4), ((1, 72, 5, 28), 2)):
        test_wgrad.check_few_rows(size, 16, (1, 1), torch.float16, chosen, parts=parts, **how)


def pack(**how):
    test_pack.check(150, 264, torch.float16, "random", blocks=2, **how)
    test_pack.check(150, 264, torch.float16, "random", blocks=2, transposed=True, **how)


# (check, file, what is replaced, by what)
FAULTS = {
    "barrier of the loop": (
        GATHERED,
        "wgrad.cuh",
        "    __syncthreads();\n    if (left > 0)",
        "    if (left > 0)",
    ),
    "copies not awaited": (
        PACKED,
        "wgrad.cuh",
        "cp_async_wait<Tile::kStages - 2>",
        "cp_async_wait<Tile::kStages - 1>",
    ),
    "rows behind the part": (GATHERED, "wgrad.cuh", "takes_dy && dy_row + row < left", "takes_dy"),
    "part of another": (
        PACKED,
        "wgrad.cuh",
        "blockIdx.z * w.t_per_part",
        "blockIdx.z * (w.t_per_part - 1)",
    ),
    "neighbour's slot": (
        GATHERED,
        "wgrad.cuh",
        "slots.at[warp_neurons + lane / 4 + 8 * i]",
        "slots.at[warp_neurons + lane / 4 + 4 * i]",
    ),
    "fragment of neurons": (
        GATHERED,
        "wgrad_tile.cuh",
        "rows + lane % 4 * 2 * pitch",
        "rows + lane % 4 * pitch",
    ),
    "fragment of columns": (
        PACKED,
        "wgrad_tile.cuh",
        "mine + f * kVectorBytes",
        "mine + f / 2 * kVectorBytes",
    ),
    "float column": (
        PLAIN,
        "wgrad_tile.cuh",
        "sums[f][1] += first * x.y",
        "sums[f][1] += first * x.x",
    ),
    "bias of other columns": (
        GATHERED,
        "wgrad.cuh",
        "blockIdx.x == 0 && warp_columns == 0",
        "blockIdx.x == 0 && warp_columns == 32",
    ),
    "slot of a new vector": (
        GATHERED,
        "slots.cuh",
        "i == 0 || before != vector",
        "i == 0 || before + 1 < vector",
    ),
    "barrier after the slots": (
        GATHERED,
        "slots.cuh",
        "  if (i == neurons - 1) slots.count = slot + 1;\n  __syncthreads();",
        "  if (i == neurons - 1) slots.count = slot + 1;",
    ),
    "tap": (
        conv,
        "wgrad.cuh",
        "(tap - down * rows.kernel_width) * rows.dilation_w",
        "tap - down * rows.kernel_width",
    ),
    "carry of a line": (conv, "wgrad.cuh", "        ++p_;", ""),
    "border": (conv, "wgrad.cuh", "h < 0 || h >= rows.height", "h >= rows.height"),
    "row of another neuron": (
        GATHERED,
        "finish.cuh",
        "f.grad + neuron * f.row_size",
        "f.grad + i * f.row_size",
    ),
    "missing part": (
        GATHERED,
        "finish.cuh",
        "part < f.number_of_parts",
        "part + 1 < f.number_of_parts",
    ),
    "frozen rows not cleared": (
        GATHERED,
        "finish.cuh",
        "if (f.c_stride == 1) {",
        "if (!is_active) return;\n  if (f.c_stride == 1) {",
    ),
    "barrier of the neurons": (
        GATHERED,
        "finish.cuh",
        "  if (thread == 0) *count = *f.count;\n  __syncthreads();",
        "  if (thread == 0) *count = *f.count;",
    ),
    "last row of a block": (
        GATHERED,
        "finish.cuh",
        "thread <= (before + kFinishThreads - 1) / groups",
        "thread < (before + kFinishThreads - 1) / groups",
    ),
    "block in the middle of a row": (
        GATHERED,
        "finish.cuh",
        "const unsigned row = (before + thread) / groups",
        "const unsigned row = thread / groups",
    ),
    "tap turned over": (
        few_rows,
        "few_rows_conv.cuh",
        "lines[kReach - tap / kTapsAcross]",
        "lines[tap / kTapsAcross]",
    ),
    "line outside of dY": (
        few_rows,
        "few_rows_conv.cuh",
        "static_cast<unsigned>(top + down[i]) < static_cast<unsigned>(f.out_height)",
        "top + down[i] < f.out_height",
    ),
    "stripe of rectangles": (
        few_rows,
        "few_rows_conv.cuh",
        "if (left < f.width) return;",
        "if (left <= f.width + 8) return;",
    ),
    "lines above of another stripe": (
        few_rows,
        "few_rows_conv.cuh",
        "elements.first_line = cursor.top == 0 ? 0 : kReach",
        "elements.first_line = kReach",
    ),
    "no lines above in a part": (few_rows, "few_rows_conv.cuh", "start(read, 0)", "start(read, 1)"),
    "border written where it is read": (
        few_rows,
        "few_rows_conv.cuh",
        "kRingLines = 2 * kBorderHeight",
        "kRingLines = kBorderHeight + kHeight",
    ),
    "border of the step after": (
        few_rows,
        "few_rows_conv.cuh",
        "multiply_taps<Tile>(sums, current,",
        "multiply_taps<Tile>(sums, border,",
    ),
    "barrier of few rows": (
        few_rows,
        "few_rows_conv.cuh",
        "cp_async_wait<Tile::kStages - 2>();\n    __syncthreads();",
        "cp_async_wait<Tile::kStages - 2>();",
    ),
    "X not awaited": (
        few_rows,
        "few_rows_conv.cuh",
        "cp_async_wait<Tile::kStages - 2>",
        "cp_async_wait<Tile::kStages - 1>",
    ),
    "bias of a column twice": (
        few_rows,
        "few_rows_conv.cuh",
        " && right[i] >= elements.first_column",
        "",
    ),
    "bias of a line twice": (
        few_rows,
        "few_rows_conv.cuh",
        "down[i] >= elements.first_line && right[i]",
        "right[i]",
    ),
    "bias over a border": (
        few_rows,
        "few_rows_conv.cuh",
        "    __syncthreads();\n    of_threads[thread] = bias;",
        "    of_threads[thread] = bias;",
    ),
    "bias of another thread": (
        few_rows,
        "few_rows_conv.cuh",
        "    of_threads[thread] = bias;\n    __syncthreads();",
        "    of_threads[thread] = bias;",
    ),
    "packed before it is staged": (
        pack,
        "pack.cuh",
        "    ptx::cp_async_wait<0>();\n    __syncthreads();",
        "    ptx::cp_async_wait<0>();",
    ),
    "staged before it is packed": (
        pack,
        "pack.cuh",
        "    __syncthreads();\n  }\n  if (p.sums",
        "  }\n  if (p.sums",
    ),
    "sum of every other row": (pack, "pack.cuh", "other < kSumRows", "other < kSumRows - 1"),
    "first channels only": (pack, "pack.cuh", "p.order + first, channels", "p.order, channels"),
}


NEEDED = {pack: ("pack",), few_rows: ("few_rows_conv", "finish")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault):
    check, file, before, after = FAULTS[fault]
    sources = NEEDED.get(check, ("wgrad", "pack", "finish"))
    fewer = without(torch.bfloat16, torch.float16 if check is PLAIN else torch.float32)
    check(kernels=library(sources, replace=fewer))
    broken = library(sources, replace=[*fewer, (file, before, after)])
    assert any(is_caught(check, broken, mode) for mode in MODES)


def is_caught(check, broken, mode):
    try:
        check(kernels=broken, mode=mode)
    except (AssertionError, EmulationError):
        return True
    return False
