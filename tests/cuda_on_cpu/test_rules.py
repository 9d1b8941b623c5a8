"""One rule of the emulator at a time, on kernels of a few lines."""

from __future__ import annotations

from enum import IntEnum

import pytest
import torch

from tests.cuda_on_cpu.cases import library, line_of
from tests.cuda_on_cpu.emulator import MODES, Device, EmulationError, Mode, Run

LANES = torch.arange(32, dtype=torch.int32)


@pytest.fixture(params=MODES, ids=str)
def mode(request) -> Mode:
    return request.param


def zeros(n: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def run(mode: Mode, function: str, *arguments, checked: bool = True, **tensors) -> None:
    """Calls ``function(*tensors, *arguments)``; ``x`` may only be read."""
    reads = {name: t for name, t in tensors.items() if name == "x"}
    writes = {name: t for name, t in tensors.items() if name != "x"}
    Run(library("probes.cu", checked=checked), mode, reads, writes).call(
        f"run_{function}", *tensors.values(), *arguments
    )


def assert_fails(kind: str, text: str, mode: Mode, function: str, *arguments, **tensors) -> None:
    with pytest.raises(EmulationError) as caught:
        run(mode, function, *arguments, **tensors)
    assert caught.value.kind == kind, caught.value
    if text:
        assert line_of("probes.cu", text) in caught.value.lines, caught.value


# --- what a launch brings along ------------------------------------------------------------------


def test_indices(mode):
    out = zeros(12 * 24)
    run(mode, "indices", out=out)
    blocks, threads = torch.arange(12), torch.arange(24)
    assert torch.equal(out.view(12, 24).long(), 1000 * blocks[:, None] + threads)


def test_arguments_by_value_and_constant_tables(mode):
    out = zeros(32, torch.float32)
    run(mode, "constants", out=out)
    expected = (LANES + 1) % 4 * 10 + 10 + LANES % 5 + 1 + 1000
    assert torch.equal(out, expected.float())


# --- warps ---------------------------------------------------------------------------------------


def test_shuffles(mode):
    out = zeros(6 * 32)
    run(mode, "shuffles", out=out)
    fourth, eighth = LANES // 4 * 4, LANES // 8 * 8
    expected = [
        (LANES + 5) % 32,
        LANES ^ 9,
        torch.where(LANES + 3 < 32, LANES + 3, LANES),
        eighth + 2,
        torch.where(LANES & 8 != 0, LANES ^ 8, LANES),
        torch.where(LANES % 4 == 0, fourth + 3, LANES),
    ]
    assert torch.equal(out.view(6, 32), torch.stack(expected))


def test_halves_of_a_warp_in_two_branches(mode):
    out = zeros(32)
    run(mode, "two_branches", out=out)
    low, high = (LANES[:16] ^ 1) + 0x11, torch.full((16,), 16) + 0x555500
    assert torch.equal(out, torch.cat([low, high]).int())


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0xFF00FF00, 0x0000000C])
def test_syncwarp_orders_the_lanes_of_its_mask(mode, mask):
    out = zeros(32)
    run(mode, "exchange", mask, False, out=out)
    named = (mask >> LANES.long()) & 1
    assert torch.equal(out, (LANES ^ 1) * named.int())


def test_lanes_that_meet_in_a_shuffle_are_not_ordered(mode):
    fault = ("probes.cu", "  __syncwarp(mask);\n", "\n")
    faulty = library("probes.cu", fault=fault)
    for mask in (0xFFFFFFFF, 0x0000FFFF):
        out = zeros(32)
        with pytest.raises(EmulationError) as caught:
            Run(faulty, mode, writes={"out": out}).call("run_exchange", out, mask, True)
        assert caught.value.kind == "race"
        assert "by another lane, with no __syncwarp between them" in str(caught.value)
        expected = ("out[lane] = cells[lane ^ 1];", "cells[lane] = lane;")
        assert sorted(caught.value.lines) == sorted(line_of("probes.cu", t) for t in expected)


SYNC = "  __syncwarp(mask);\n  out[lane] = cells[lane ^ 1];\n"


def test_partial_syncs_order_through_common_lanes(mode):
    # The first one leaves out lane 31, the second one lane 0.
    chain = SYNC.replace(
        "__syncwarp(mask);",
        "if (lane < 31) __syncwarp(0x7fffffff); if (lane > 0) __syncwarp(0xfffffffe);",
    )
    chained, out = library("probes.cu", fault=("probes.cu", SYNC, chain)), zeros(32)
    Run(chained, mode, writes={"out": out}).call("run_exchange", out, 0xFFFFFFFF, False)
    assert torch.equal(out, LANES ^ 1)


def test_partial_syncs_without_common_lanes_order_nothing(mode):
    halves = "  __syncwarp(lane < 16 ? 0xffff : 0xffff0000);\n  out[lane] = cells[31 - lane];\n"
    apart, out = library("probes.cu", fault=("probes.cu", SYNC, halves)), zeros(32)
    with pytest.raises(EmulationError) as caught:
        Run(apart, mode, writes={"out": out}).call("run_exchange", out, 0xFFFFFFFF, True)
    assert caught.value.kind == "race"


def test_a_shuffle_reads_from_lanes_of_its_mask_only(mode):
    text = "out[lane] = __shfl_sync(0x0000ffffu, lane, 20);"
    assert_fails("divergence", text, mode, "shuffle_from_outside", out=zeros(32))


@pytest.mark.parametrize("checked", [True, False])
def test_lanes_that_wait_elsewhere(mode, checked):
    with pytest.raises(EmulationError, match="no thread can go on") as caught:
        run(mode, "diverged", checked=checked, out=zeros(32))
    assert caught.value.kind == "deadlock"
    assert {place.what for place in caught.value.others} == {
        "waits in __shfl_sync",
        "waits in __syncthreads",
    }


@pytest.mark.parametrize("checked", [True, False])
def test_lanes_that_wait_for_each_other(mode, checked):
    with pytest.raises(EmulationError, match="no thread can go on") as caught:
        run(mode, "endless", checked=checked, out=zeros(32))
    assert sorted(set(caught.value.lines)) == [
        line_of("probes.cu", "__shfl_sync(0x0001ffffu"),
        line_of("probes.cu", "__shfl_sync(0xffff8000u"),
    ]


# --- blocks --------------------------------------------------------------------------------------


def test_who_remains_meets_at_the_barrier(mode):
    out = zeros(32)
    run(mode, "early_end", out=out)
    assert torch.equal(out, LANES.flip(0))


def test_atomics_in_shared_memory(mode):
    values, out = torch.randint(0, 4, (64,), dtype=torch.int32), zeros(4)
    run(mode, "histogram", True, x=values, out=out)
    assert torch.equal(out.long(), values.bincount(minlength=4))
    text = "atomicAdd(&shared_ints()"
    assert_fails("race", text, mode, "histogram", False, x=values, out=out)


# --- grids ---------------------------------------------------------------------------------------


class Fences(IntEnum):
    """As in the source of the kernel."""

    BEFORE_BARRIER = 0
    AFTER_BARRIER = 1
    NO_FIRST = 2
    NO_SECOND = 3
    READER_FENCES = 4


@pytest.mark.parametrize("fences", Fences)
def test_the_last_block_reads_what_the_others_left(mode, fences):
    parts, ticket, out = zeros(5 * 64), zeros(1), zeros(64)
    tensors = {"parts": parts, "ticket": ticket, "out": out}
    if fences in (Fences.NO_FIRST, Fences.NO_SECOND):
        text = "sum += parts[b * blockDim.x"
        assert_fails("race", text, mode, "last_adds", 5, int(fences), **tensors)
        return
    for _ in range(2):
        run(mode, "last_adds", 5, int(fences), **tensors)
        assert torch.equal(out, 5 * torch.arange(64, dtype=torch.int32))
        assert ticket.item() == 0


def test_the_last_warp_reads_what_the_others_left(mode):
    parts, ticket, out = zeros(6 * 32), zeros(1), zeros(32)
    tensors = {"parts": parts, "ticket": ticket, "out": out}
    run(mode, "last_warp_adds", 3, True, **tensors)
    assert torch.equal(out, 6 * LANES)
    ticket.zero_()
    text = "sum += parts[w * 32 + lane];"
    assert_fails("race", text, mode, "last_warp_adds", 3, False, **tensors)


def test_blocks_that_only_read(mode):
    given, out = torch.ones(32, dtype=torch.int32), zeros(32)
    run(mode, "read_and_write", 1, given=given, out=out)
    assert_fails("race", "", mode, "read_and_write", 4, given=given.repeat(4), out=zeros(128))


# --- memory --------------------------------------------------------------------------------------


class Touch(IntEnum):
    """As in the source of the kernel."""

    READ = 0
    WRITE = 1
    NULL = 2
    STACK = 3
    SET = 4
    COPY = 5
    READ_ONLY = 6


@pytest.mark.parametrize(
    ("how", "at", "count", "message"),
    [
        (Touch.READ, 32, 0, "read of 4 bytes, ending 4 bytes past the end of x of 128 bytes"),
        (Touch.READ, -1, 0, "read of 4 bytes, beginning 4 bytes before x of 128 bytes"),
        (Touch.WRITE, 3, 0, "write of x, byte 12 (element 3), which this launch may only read"),
        (Touch.NULL, 0, 0, "write of 4 bytes, 0 past a null pointer"),
        (Touch.STACK, 1, 0, "read of 4 bytes on the stack of another thread"),
        (Touch.SET, 30, 12, "write of 12 bytes, ending 4 bytes past the end of out of 128 bytes"),
        (Touch.COPY, 0, 132, "read of 132 bytes, ending 4 bytes past the end of x of 128 bytes"),
    ],
)
def test_bounds(mode, how, at, count, message):
    x, out = LANES.clone(), zeros(64)[:32]
    with pytest.raises(EmulationError) as caught:
        run(mode, "touch", int(how), at, count, x=x, out=out)
    assert caught.value.kind == "out of bounds"
    assert message in str(caught.value)


def test_the_read_only_cache_does_not_see_what_the_launch_writes(mode):
    text = "out[threadIdx.x] = __ldg(out + threadIdx.x);"
    tensors = {"x": LANES.clone(), "out": zeros(32)}
    assert_fails("stale read", text, mode, "touch", int(Touch.READ_ONLY), 0, 0, **tensors)


def test_only_the_elements_of_a_view_may_be_touched(mode):
    whole, out = torch.arange(64, dtype=torch.int32), zeros(32)
    run(mode, "touch", int(Touch.READ), 31, 0, x=whole[:32], out=out)
    assert out.eq(31).all()
    for x, at in ((whole[:32], 32), (whole[32:], -1)):
        with pytest.raises(EmulationError, match="out of bounds"):
            run(mode, "touch", int(Touch.READ), at, 0, x=x, out=out)


def test_targets_of_copies_are_not_touched_before_the_wait(mode):
    x, out = torch.randn(128), zeros(32, torch.float32)
    run(mode, "touch_copy", 0, x=x, out=out)
    assert torch.equal(out, x.view(32, 4)[:, 1])
    run(mode, "touch_copy", 1, x=x, out=out)
    assert torch.equal(out, x.view(32, 4)[:, 1])
    text = "out[threadIdx.x] = cells[4 * threadIdx.x + 1];"
    assert_fails("unfinished copy", text, mode, "touch_copy", 2, x=x, out=out)


def test_copies_read_no_more_than_they_are_told_to(mode):
    x, out = torch.randn(6), zeros(8, torch.float32)
    for bytes in (8, 4, 0):
        run(mode, "copy_some", bytes, x=x, out=out)
        expected = torch.zeros(2, 4)
        expected[0, : bytes // 4], expected[1, : bytes // 4] = x[: bytes // 4], x[4:][: bytes // 4]
        assert torch.equal(out.view(2, 4), expected)
    assert_fails("out of bounds", "cp_async_up_to_16", mode, "copy_some", 12, x=x, out=out)


def test_tensors_are_those_of_the_run():
    probes, x = library("probes.cu"), torch.zeros(64)
    first, _second = Run(probes, writes={"x": x}), Run(probes, writes={"x": x})
    with pytest.raises(RuntimeError, match="another run of this library has begun"):
        first.call("run_add_all", x, 1)
    with pytest.raises(ValueError, match="share no memory, got a and b"):
        Run(probes, reads={"a": x[:33]}, writes={"b": x[32:]})
    with pytest.raises(ValueError, match="a tensor of the run"):
        Run(probes, reads={"a": x[:32]}).call("run_add_all", x, 1)


# --- host ----------------------------------------------------------------------------------------


def launch(blocks=1, threads=64, shared=128, allowed=0, device=Device()):  # noqa: B008
    out = zeros(32)
    run = Run(library("probes.cu"), writes={"out": out}, device=device)
    run.call("run_launch", out, blocks, threads, shared, allowed)
    return run.launches[-1].shared_bytes


KIB = 1024


def test_dynamic_shared_memory_has_limits():
    assert launch(shared=48 * KIB) == 48 * KIB
    with pytest.raises(EmulationError, match=r"invalid argument \(49153 bytes of dynamic"):
        launch(shared=48 * KIB + 1)
    assert launch(shared=99 * KIB, allowed=99 * KIB) == 99 * KIB
    with pytest.raises(EmulationError, match="this kernel may have 65536"):
        launch(shared=99 * KIB, allowed=64 * KIB)
    with pytest.raises(EmulationError, match="a block has at most 101376"):
        launch(shared=100 * KIB, allowed=100 * KIB)
    hopper = Device(compute_capability=90, shared_limit=227 * KIB)
    assert launch(shared=227 * KIB, allowed=227 * KIB, device=hopper) == 227 * KIB


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"threads": 0}, {"threads": 1056}])
def test_impossible_launches_are_refused(wrong):
    with pytest.raises(EmulationError, match="invalid configuration argument") as caught:
        launch(**wrong)
    assert caught.value.kind == "launch"


def test_an_error_that_the_launcher_drops_is_reported():
    out = zeros(32)
    with pytest.raises(EmulationError, match="a grid of 0 x 1 x 1 blocks"):
        Run(library("probes.cu"), writes={"out": out}).call("run_unseen", out)


def test_memory_is_set_within_bounds():
    probes, out = library("probes.cu"), zeros(32)
    (made,) = Run(probes, writes={"out": out}).call("run_set", out, 128)
    assert out.eq(0x01010101).all()
    assert made.regions["out"].written_bytes == 128
    with pytest.raises(EmulationError, match="ending 1 byte past the end of out"):
        Run(probes, writes={"out": out}).call("run_set", out, 129)
    with pytest.raises(EmulationError, match="out may only be read"):
        Run(probes, reads={"out": out}).call("run_set", out, 128)


def test_the_device_is_what_the_run_says():
    probes = library("probes.cu")
    Run(probes, device=Device(multiprocessors=7, compute_capability=86, shared_limit=1234))
    multiprocessors, major, minor, optin = 16, 75, 76, 97
    attributes = [
        probes.functions.device_attribute(a) for a in (multiprocessors, major, minor, optin)
    ]
    assert attributes == [7, 8, 6, 1234]
