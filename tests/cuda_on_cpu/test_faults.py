"""Faults planted into the example kernels are found in every mode, with the line; the kernels
without them are silent (``test_example.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from tests.cuda_on_cpu import cases
from tests.cuda_on_cpu.emulator import MODES, EmulationError, Launch, Library, Mode

Check = Callable[[Library, Mode], list[Launch]]

ONE_SPLIT: Check = partial(cases.product, splits=1)
THREE_SPLITS: Check = partial(cases.product, splits=3)
BY_ROWS: Check = partial(cases.product, by_rows=True)
SUMS: Check = cases.row_sums
COPY_16: Check = cases.copy_16

# What comes first when nothing orders a write and a read depends on the mode.
UNORDERED = ("race", "uninitialised")


@dataclass(frozen=True)
class Fault:
    """A text that is replaced in a source, and of what kinds the error is; it names the line with
    the text ``at`` and that with the text ``other``."""

    check: Check
    file: str
    before: str
    after: str
    kinds: str | tuple[str, ...]
    at: str = ""
    other: str = ""

    def library(self) -> Library:
        name = "row_sums.cu" if self.check in (SUMS, COPY_16) else "product.cu"
        return cases.library(name, fault=(self.file, self.before, self.after))

    def assert_is(self, error: EmulationError) -> None:
        assert error.kind in self.kinds, error
        for text in filter(None, (self.at, self.other)):
            assert cases.line_of(self.source, text) in error.lines, error

    @property
    def source(self) -> str:
        return self.file.replace(".cuh", ".cu").replace(".cu", ".cuh")


COPY = "neq::ptx::cp_async_16("
LOAD_A = "neq::ptx::ldmatrix_x4_trans("
STORE = "*reinterpret_cast<float2*>(to) ="
READ_PART = "*reinterpret_cast<const float4*>(parts"
DRAW = "tiles.is_last = atomicAdd"
READ_HALVES = "sum = halves[warp][0]"
SHUFFLE = "sum += __shfl_down_sync"
BALLOT = "__ballot_sync(0xffffffffu"

FAULTS = {
    "missing first barrier": Fault(
        ONE_SPLIT, "product.cuh", "__syncthreads();  // the stage is there", ";", UNORDERED, LOAD_A
    ),
    "missing second barrier": Fault(
        ONE_SPLIT,
        "product.cuh",
        "__syncthreads();  // the stage is free",
        ";",
        "race",
        COPY,
    ),
    "one warp passes a barrier": Fault(
        ONE_SPLIT,
        "product.cuh",
        "__syncthreads();  // the stage is free",
        "if (warp != 1) __syncthreads();",
        "race",
        COPY,
    ),
    "two barriers": Fault(
        THREE_SPLITS,
        "product.cuh",
        "__threadfence();  // the part is written before the ticket is drawn\n  __syncthreads();",
        "__threadfence(); if (warp == 1) __syncthreads(); else\n  __syncthreads();",
        "divergence",
        "__threadfence();  // the part is written",
    ),
    "waits for one group too few": Fault(
        ONE_SPLIT,
        "product.cuh",
        "cp_async_wait<kStages - 1>",
        "cp_async_wait<kStages>",
        "unfinished copy",
        LOAD_A,
        COPY,
    ),
    "reads past the end": Fault(
        ONE_SPLIT,
        "product.cuh",
        "(inside ? offset : 0), inside",
        "offset, true",
        "out of bounds",
        COPY,
    ),
    "writes past the end": Fault(
        ONE_SPLIT,
        "product.cuh",
        "if (row + 8 < m) {",
        "{",
        "out of bounds",
        "*reinterpret_cast<float2*>(to + 8 * n)",
    ),
    "too little shared memory": Fault(
        ONE_SPLIT,
        "product.cu",
        "config.dynamicSmemBytes = kSharedBytes;",
        "config.dynamicSmemBytes = kSharedBytes - 64;",
        "out of bounds",
        COPY,
    ),
    "matrix row past the shared memory": Fault(
        ONE_SPLIT,
        "product.cuh",
        "[k0 + lane / 16 * 8 + lane % 8][mi",
        "[k0 + 1000 + lane % 8][mi",
        "out of bounds",
        LOAD_A,
    ),
    "reads past the shared memory": Fault(
        SUMS,
        "row_sums.cuh",
        "sum = halves[warp][0]",
        "sum = halves[warp + kRowsPerBlock][0]",
        "out of bounds",
        READ_HALVES,
    ),
    "writes before the shared memory": Fault(
        SUMS,
        "row_sums.cuh",
        "halves[warp][lane / 16] = sum;",
        "halves[warp - kRowsPerBlock][lane / 16] = sum;",
        "out of bounds",
        "halves[warp][lane / 16] = sum;",
    ),
    "writes to an input": Fault(
        SUMS,
        "row_sums.cuh",
        "sums[row] = sum;",
        "const_cast<float*>(x)[row] = sum;",
        "out of bounds",
        "sums[row] = sum;",
    ),
    "splits write the same part": Fault(
        THREE_SPLITS,
        "product.cuh",
        "parts + int64_t{m} * n * blockIdx.z;",
        "parts;",
        "race",
        STORE,
    ),
    "missing fence before the ticket": Fault(
        THREE_SPLITS,
        "product.cuh",
        "__threadfence();  // the part",
        "// the part",
        "race",
        READ_PART,
        STORE,
    ),
    "missing fence after the ticket": Fault(
        THREE_SPLITS,
        "product.cuh",
        "__threadfence();  // the ticket",
        "// the ticket",
        "race",
        READ_PART,
        STORE,
    ),
    "missing barrier after the ticket": Fault(
        THREE_SPLITS,
        "product.cuh",
        "  __syncthreads();\n  if (!tiles.is_last)",
        "\n  if (!tiles.is_last)",
        UNORDERED,
        "if (!tiles.is_last) return;",
    ),
    "ticket without an atomic": Fault(
        THREE_SPLITS, "product.cuh", "atomicAdd(ticket, 1) ==", "(*ticket)++ ==", "race", DRAW
    ),
    "sum without an atomic": Fault(
        SUMS,
        "row_sums.cuh",
        "atomicAdd(total, sum);",
        "*total += sum;",
        "race",
        "atomicAdd(total, sum);",
    ),
    "missing __syncwarp": Fault(SUMS, "row_sums.cuh", "__syncwarp();", ";", UNORDERED, READ_HALVES),
    "shared memory that nobody wrote": Fault(
        SUMS, "row_sums.cuh", "if (lane % 16 == 0)", "if (lane == 0)", "uninitialised", READ_HALVES
    ),
    "16 bytes at a multiple of 4": Fault(
        COPY_16,
        "row_sums.cuh",
        "load_16_streaming(from + 4 * chunk)",
        "load_16_streaming(from + 4 * chunk + 1)",
        "misaligned",
        "load_16_streaming",
    ),
    "copies to a multiple of 8": Fault(
        ONE_SPLIT, "product.cuh", "kPadding = 8;", "kPadding = 4;", "misaligned", COPY
    ),
    "shared memory not asked for": Fault(
        BY_ROWS, "product.cu", "kSharedBytes > 48 * 1024", "kSharedBytes > 480 * 1024", "launch"
    ),
    "a lane ends before a shuffle": Fault(
        SUMS,
        "row_sums.cuh",
        "const bool inside = row < rows;",
        "const bool inside = row < rows; if (lane == 31) return;",
        "exited lane",
        SHUFFLE,
    ),
    "a lane waits elsewhere": Fault(
        SUMS,
        "row_sums.cuh",
        "const unsigned votes = __ballot_sync",
        "if (lane == 4) __syncthreads(); const unsigned votes = __ballot_sync",
        "deadlock",
        BALLOT,
    ),
}

# Nothing is wrong with these but the result.
WRONG_RESULTS = {
    "wrong fragment of a, transposed": Fault(
        ONE_SPLIT,
        "product.cuh",
        "[k0 + lane / 16 * 8 + lane % 8][mi + lane / 8 % 2 * 8]",
        "[k0 + lane / 8 % 2 * 8 + lane % 8][mi + lane / 16 * 8]",
        (),
    ),
    "wrong fragment of a": Fault(
        BY_ROWS,
        "product.cuh",
        "[mi + lane % 16][k0 + lane / 16 * 8]",
        "[mi + lane / 16 * 8 + lane % 8][k0 + lane / 8 % 2 * 8]",
        (),
    ),
    "wrong fragment of b": Fault(
        ONE_SPLIT,
        "product.cuh",
        "[k0 + lane % 16][nj]",
        "[k0 + (lane + 8) % 16][nj]",
        (),
    ),
    "missing part": Fault(
        THREE_SPLITS,
        "product.cuh",
        "split < int(gridDim.z); ++split",
        "split < int(gridDim.z) - 1; ++split",
        (),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    fault = FAULTS[name]
    library = fault.library()
    for mode in MODES:
        torch.manual_seed(0)
        with pytest.raises(EmulationError) as caught:
            fault.check(library, mode)
        fault.assert_is(caught.value)


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_wrong_result_is_found(name):
    fault = WRONG_RESULTS[name]
    library = fault.library()
    for mode in MODES:
        torch.manual_seed(0)
        with pytest.raises(AssertionError, match="relative error"):
            fault.check(library, mode)


def test_the_message_names_everything():
    fault = FAULTS["missing second barrier"]
    with pytest.raises(EmulationError) as caught:
        fault.check(fault.library(), Mode())
    error = caught.value
    assert error.kernel.startswith("void example::product<__half, false, 2>(")
    assert error.place is not None
    assert error.place.file == str(cases.KERNELS / "product.cuh")
    assert error.place.source.startswith(COPY)
    (reader,) = error.others
    assert (reader.what, reader.block) == ("a read", error.place.block)
    assert reader.source.startswith("neq::ptx::ldmatrix_x")
    for part in ("race: write of shared memory, byte", COPY, f"{reader.file}:{reader.line}"):
        assert part in str(error)


def test_after_an_error_the_next_run_starts_afresh():
    fault = FAULTS["missing second barrier"]
    for _ in range(2):
        with pytest.raises(EmulationError, match="race"):
            fault.check(fault.library(), Mode())
    cases.product(cases.library("product.cu"), Mode())
