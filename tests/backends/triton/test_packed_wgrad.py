"""The product that reads packed dY by tensor descriptors, against float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.triton import packed_wgrad
from neq_kernels.backends.triton.linear_wgrad import linear_wgrad
from neq_kernels.backends.triton.tiles import Tiles, choices
from tests.support.gpu_cases import DTYPES, MASKS, assert_gradient, channels, poison
from tests.support.wgrad_operands import linear_operands

SMALL = Tiles(16, 32, 16, 4, 2, packed=True)
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]


@pytest.fixture
def products(monkeypatch) -> list[Tiles]:
    """The tiles of every packed product."""
    made, product = [], packed_wgrad.product
    monkeypatch.setattr(packed_wgrad, "product", lambda *a: (made.append(a[-1]), product(*a)))
    return made


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_dtype_and_mask(dtype, mask, splits, device, products):
    t, k, c = 70, 37, 40
    dy, x, _, on_device = linear_operands(t, k, c, dtype, device)
    chosen = channels(k, mask)
    order, count = chosen.order(device), chosen.count(device)
    poison(device)
    grad, bias = linear_wgrad(
        *on_device, order, count, chosen.n_active, True, splits=splits, tiles=SMALL
    )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)
    assert products == [SMALL]


@pytest.mark.parametrize(("t", "k", "c"), [(1, 1, 8), (16, 16, 32), (33, 17, 104), (257, 5, 16)])
def test_ragged_shapes(t, k, c, device, products):
    dy, x, _, on_device = linear_operands(t, k, c, torch.float16, device)
    chosen = channels(k, "random")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    grad, bias = linear_wgrad(*on_device, order, count, n, True, tiles=SMALL)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)
    grad, bias = linear_wgrad(*on_device, order, count, n, False, tiles=SMALL)
    assert bias is None
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert products == [SMALL] * 2


@pytest.mark.parametrize("splits", [1, 2])
def test_a_count_that_changes_is_read_on_the_device(splits, device, products):
    t, k, c = 40, 20, 24
    dy, x, _, on_device = linear_operands(t, k, c, torch.float16, device)
    chosen = channels(k, "all")
    order, count = chosen.order(device), chosen.count(device)
    for mask in ("random", "one", "none", "all"):
        chosen.set(MASKS[mask](k))
        poison(device)
        grad, bias = linear_wgrad(*on_device, order, count, k, True, splits=splits, tiles=SMALL)
        assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
        assert_gradient(bias, dy.double().sum(0), chosen, t)
    assert len(products) == 4


def test_nan_of_a_frozen_feature_reaches_nothing(device, products):
    t, k, c = 40, 20, 24
    dy, x, _, (dy_d, x_d, weight_d) = linear_operands(t, k, c, torch.float16, device)
    chosen, dy = channels(k, "random"), dy.clone()
    dy_d[:, chosen.frozen.to(dy_d.device)] = float("nan")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    grad, bias = linear_wgrad(dy_d, x_d, weight_d, order, count, n, True, tiles=SMALL)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)
    assert len(products) == 1


def test_bits_do_not_change_from_run_to_run(device):
    t, k, c = 200, 30, 40
    *_, on_device = linear_operands(t, k, c, torch.float16, device)
    chosen = channels(k, "random")
    arguments = (*on_device, chosen.order(device), chosen.count(device), chosen.n_active, True)
    runs = [linear_wgrad(*arguments, splits=4, tiles=SMALL) for _ in range(3)]
    for grad, bias in runs[1:]:
        assert torch.equal(grad, runs[0][0])
        assert torch.equal(bias, runs[0][1])


def not_described():
    """Operands that no descriptor can describe: (dY, X) of 32 rows."""
    whole = torch.randn(33, 49, generator=torch.Generator().manual_seed(0)).half()
    yield whole[1:, :20], whole[1:, 1:25]  # rows of an odd length
    wide = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
    yield wide[:, :20], wide[:, 4:28]  # a start that is no multiple of 16 bytes
    yield wide.t().contiguous().t()[:, :20], wide[:, :24]  # columns that are not side by side
    yield wide[:, :20].float(), wide[:, :24].float()


@pytest.mark.parametrize("case", range(4))
def test_what_descriptors_cannot_describe_is_gathered(case, device, products):
    dy, x = list(not_described())[case]
    dy_d, x_d = (
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)
        if t.storage_offset() == 0
        else t._base.to(device).as_strided(t.shape, t.stride(), t.storage_offset())
        for t in (dy, x)
    )
    chosen = channels(20, "random")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    weight = torch.zeros(20, 24, dtype=x.dtype, device=device)
    grad, bias = linear_wgrad(dy_d, x_d, weight, order, count, n, True, tiles=SMALL)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, 32)
    assert_gradient(bias, dy.double().sum(0), chosen, 32)
    assert not products


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_where_it_is_the_first_choice(arch):
    def first(n, dtype=torch.float16, **where):
        return choices(n, 1024, dtype, "ieee", arch, **where)[0].packed

    has_it = arch in ("sm_90", "sm_100", "sm_120")
    assert first(512, described=True) == has_it
    assert not first(8, described=True)
    assert not first(512)
    assert not first(512, torch.float32)
