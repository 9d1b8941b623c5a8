"""Compiling for GPUs that are not there."""

import pytest
import torch

from benchmarks import ahead_of_time, targets
from benchmarks.dense_product import product
from neq_kernels.backends.triton.tiles import Tiles


def launches_of(call):
    with ahead_of_time.recorded() as launches:
        call()
    return launches


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_dense_product_multiplies_in_tensor_cores_without_spills(target):
    dy, x = (torch.empty(512, 256, dtype=torch.float16, device="meta") for _ in range(2))
    (launch,) = launches_of(lambda: product(dy, x, Tiles(32, 64, 64, 4, 3), "ieee"))
    compiled = ahead_of_time.compile_for(launch, ahead_of_time.TARGETS[target])
    assert launch.arguments["t"] == 512
    assert compiled.spills == 0
    assert 0 < compiled.tensor_core < compiled.loop
    assert compiled.registers > 0
    assert compiled.asynchronous > 0 or target == "gfx942"


def test_a_kernel_that_needs_more_registers_than_there_are_spills():
    dy, x = (torch.empty(512, 512, dtype=torch.float16, device="meta") for _ in range(2))
    (launch,) = launches_of(lambda: product(dy, x, Tiles(256, 256, 16, 1, 1), "ieee"))
    assert ahead_of_time.compile_for(launch, ahead_of_time.TARGETS["sm_80"]).spills > 0


def test_every_case_launches_kernels():
    names = {launch.name for case in targets.cases() for launch in launches_of(case.call)}
    assert names == {
        "wgrad_kernel",
        "add_parts_kernel",
        "gather_kernel",
        "scatter_kernel",
        "similarity_kernel",
    }


GATED = {"linear n=32 splits=8", "conv nhwc n=8", "depthwise nchw", "gather transposed"}


@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_kernels_multiply_in_tensor_cores_without_spills(target, monkeypatch):
    chosen = [c for c in targets.cases() if c.dtype == torch.bfloat16 and c.name in GATED]
    monkeypatch.setattr(targets, "cases", lambda: chosen)
    rows = list(targets.rows([target]))
    assert len(rows) >= len(GATED)
    assert [row for row in rows if row.get("error") or row["fails"]] == []
    shares = [row["share"] for row in rows if "share" in row]
    assert len(shares) == 2
    assert min(shares) > 0


def test_a_kernel_that_spills_fails(monkeypatch):
    large = Tiles(256, 256, 16, 1, 1)
    monkeypatch.setattr(targets.linear_wgrad.Tiles, "of", lambda *_, **__: large)
    chosen = [c for c in targets.cases() if c.name == "linear n=512 splits=1"][:1]
    monkeypatch.setattr(targets, "cases", lambda: chosen)
    (row,) = targets.rows(["sm_80"])
    assert "spills" in row["fails"]
