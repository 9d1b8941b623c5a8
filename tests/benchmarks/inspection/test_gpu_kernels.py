"""Compiling for GPUs that are not there."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.inspection import compile, gpu_kernels
from benchmarks.inspection.compile import Compiled
from benchmarks.inspection.dense_product import product
from neq_kernels.backends.triton import multi_tensor
from neq_kernels.backends.triton.linear_wgrad import linear_wgrad
from neq_kernels.backends.triton.tiles import Tiles

# 256 registers per thread for the sums alone.
SPILLING = Tiles(64, 128, 16, 1, 1)


def launches_of(call):
    with compile.recorded() as launches:
        call()
    return launches


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_dense_product_multiplies_in_tensor_cores_without_spills(target):
    dy, x = (torch.empty(512, 256, dtype=torch.float16, device="meta") for _ in range(2))
    (launch,) = launches_of(lambda: product(dy, x, Tiles(32, 64, 64, 4, 3), "ieee"))
    compiled = compile.compile_for(launch, compile.TARGETS[target])
    assert launch.arguments["t"] == 512
    assert compiled.warps == 4
    assert compiled.spills == 0
    assert 0 < compiled.tensor_core < compiled.loop
    assert compiled.registers > 0
    assert compiled.asynchronous > 0 or target == "gfx942"


@pytest.mark.parametrize("target", ["sm_80", "gfx1100"])
def test_a_kernel_that_needs_more_registers_than_there_are_spills(target):
    dy, x = (torch.empty(512, 512, dtype=torch.float16, device="meta") for _ in range(2))
    (launch,) = launches_of(lambda: product(dy, x, SPILLING, "ieee"))
    assert compile.compile_for(launch, compile.TARGETS[target]).spills > 0


def test_every_case_launches_kernels():
    names = {launch.name for case in gpu_kernels.cases() for launch in launches_of(case.call)}
    assert names == {
        "wgrad_kernel",
        "add_parts_kernel",
        "gather_kernel",
        "scatter_kernel",
        "product_kernel",
        "sgd_kernel",
        "adam_kernel",
    }


@pytest.mark.parametrize("name", [*gpu_kernels.SGD, *gpu_kernels.ADAM])
def test_an_optimizers_case_is_what_its_name_says(name):
    case = next(c for c in gpu_kernels.cases() if c.name == name)
    (launch,) = launches_of(case.call)
    flags = {key: value for key, value in launch.arguments.items() if isinstance(value, bool)}
    if name in gpu_kernels.ADAM:
        assert flags == {"AMSGRAD": gpu_kernels.ADAM[name]}
    else:
        keys = ("MOMENTUM", "COUNTED", "NESTEROV")
        assert flags == dict(zip(keys, gpu_kernels.SGD[name], strict=True))


GATED = {
    "linear n=32 splits=8",
    "conv nhwc n=8",
    "depthwise nchw",
    "gather transposed",
    "sgd counted nesterov",
    "adam amsgrad",
}


def only(names, monkeypatch):
    """The table has no other cases, and these in one dtype."""
    chosen = [c for c in gpu_kernels.cases() if c.dtype == torch.bfloat16 and c.name in names]
    monkeypatch.setattr(gpu_kernels, "cases", lambda: chosen)


def failures(rows):
    return [row.get("error") or row["fails"] for row in rows if row.get("error") or row["fails"]]


@pytest.mark.parametrize("target", compile.TARGETS)
def test_kernels_multiply_in_tensor_cores_without_spills(target, monkeypatch):
    only(GATED, monkeypatch)
    rows = list(gpu_kernels.rows([target]))
    assert {row["case"] for row in rows} == GATED
    assert failures(rows) == []
    products = [row for row in rows if "share" in row]
    assert len({row["case"] for row in products}) == 2
    assert min(row["share"] for row in products) > 0
    assert all(0 < row["occupancy"] <= 1 for row in rows)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_a_packed_product_has_the_main_loop_of_a_dense_one(target, monkeypatch):
    only({"linear n=512 splits=8"}, monkeypatch)
    rows = [
        row for row in gpu_kernels.rows([target]) if row["kernel"] == "packed_wgrad.product_kernel"
    ]
    assert len(rows) == 2
    assert failures(rows) == []
    assert all(row["share"] >= gpu_kernels.LEAST_SHARE * row["dense_share"] > 0 for row in rows)


def test_a_slow_main_loop_fails():
    fast, slow = (Compiled(8, 64, 0, 1024, loop, 8, 0) for loop in (80, 100))
    assert (
        gpu_kernels.judged(slow, "sm_90", fast, gpu_kernels.LEAST_SHARE)["fails"]
        == "slow main loop"
    )
    assert gpu_kernels.judged(slow, "sm_90", fast)["fails"] == ""


def plant(call, monkeypatch, **about):
    """The table has but this case."""
    planted = gpu_kernels.Case("planted", torch.bfloat16, call, **about)
    monkeypatch.setattr(gpu_kernels, "cases", lambda: [planted])


@pytest.mark.parametrize("target", ["sm_80", "gfx1100"])
def test_a_product_that_spills_fails(target, monkeypatch):
    def call():
        dy, x, weight = (torch.empty(512, 512, dtype=torch.bfloat16, device="meta") for _ in "abc")
        order = torch.empty(512, dtype=torch.int64, device="meta")
        count = torch.empty(1, dtype=torch.int32, device="meta")
        linear_wgrad(dy, x, weight, order, count, 512, True, tiles=SPILLING, splits=1)

    plant(call, monkeypatch, multiplies=True)
    assert failures(gpu_kernels.rows([target])) == ["spills"]


@pytest.mark.parametrize("target", ["sm_80", "gfx1100"])
def test_an_optimizer_that_spills_fails(target, monkeypatch):
    monkeypatch.setattr(multi_tensor, "_STRETCH", 8192)
    only({"adam amsgrad"}, monkeypatch)
    assert failures(gpu_kernels.rows([target])) == ["spills"]


@triton.jit
def wgrad_kernel(
    dy,
    x,
    out,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A tile's product, of which no tensor core knows."""
    rt, rn, rc = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    a = tl.load(dy + rt[:, None] * BLOCK_N + rn[None, :]).to(tl.float32)
    b = tl.load(x + rt[:, None] * BLOCK_C + rc[None, :]).to(tl.float32)
    tile = tl.sum(a[:, :, None] * b[:, None, :], axis=0)
    tl.store(out + rn[:, None] * BLOCK_C + rc[None, :], tile)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_product_without_a_tensor_core_fails(target, monkeypatch):
    def call():
        dy, x, out = (torch.empty(16, 16, dtype=torch.bfloat16, device="meta") for _ in range(3))
        sizes = {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_T": 16}
        wgrad_kernel[(1,)](dy, x, out, PRECISION="ieee", **sizes, num_warps=4, num_stages=1)

    plant(call, monkeypatch, multiplies=True)
    assert failures(gpu_kernels.rows([target])) == ["no tensor core"]


def test_what_the_compiler_refuses_fails(monkeypatch):
    def call():
        none = torch.empty(16, dtype=torch.bfloat16, device="meta")
        sizes = {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_T": 15}
        wgrad_kernel[(1,)](none, none, none, PRECISION="ieee", **sizes)

    plant(call, monkeypatch)
    (failure,) = failures(gpu_kernels.rows(["sm_90"]))
    assert failure.startswith("CompilationError")


FINE = Compiled(4, 64, 0, 1024, 100, 10, 0)


@pytest.mark.parametrize(
    ("compiled", "plain", "fails"),
    [
        (FINE, None, ""),
        (FINE, FINE, ""),
        (Compiled(4, 64, 1, 1024, 0, 0, 0), None, "spills"),
        (Compiled(4, 64, 0, 163 << 10, 0, 0, 0), None, ""),
        (Compiled(4, 64, 0, (163 << 10) + 1, 0, 0, 0), None, "does not fit"),
        (Compiled(16, 255, 0, 0, 0, 0, 0), None, "does not fit"),
        (Compiled(4, 64, 0, 0, 0, 0, 0), FINE, "no tensor core"),
        (Compiled(4, 64, 0, 0, 0, 0, 0), Compiled(4, 64, 0, 0, 0, 0, 0), ""),
        (Compiled(4, 64, 9, 1 << 20, 0, 0, 0), FINE, "spills, does not fit, no tensor core"),
    ],
)
def test_what_fails(compiled, plain, fails):
    row = gpu_kernels.judged(compiled, "sm_80", plain)
    assert row["fails"] == fails
    assert row["registers"] == compiled.registers
    assert row.get("dense_share") == (plain and plain.tensor_core / max(1, plain.loop))


def test_the_share_of_resident_warps():
    assert gpu_kernels.judged(FINE, "sm_80")["occupancy"] == 0.5
    assert gpu_kernels.judged(FINE, "gfx942")["occupancy"] == 1
