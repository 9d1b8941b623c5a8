"""The split-K product of a linear layer's weight gradient, against float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.triton import linear_wgrad as module
from neq_kernels.backends.triton import tiles as tiles_module
from neq_kernels.backends.triton.tiles import Tiles
from tests.support.gpu_cases import DTYPES, MASKS, assert_gradient, channels
from tests.support.wgrad_operands import linear_operands

SMALL = Tiles(16, 32, 16, 4, 2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_mask(dtype, mask, splits, device):
    t, k, c = 70, 37, 45
    dy, x, _, on_device = linear_operands(t, k, c, dtype, device)
    chosen = channels(k, mask)
    order, count = chosen.order(device), chosen.count(device)
    grad, bias = module.linear_wgrad(
        *on_device, order, count, chosen.n_active, True, splits=splits, tiles=SMALL
    )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)


@pytest.mark.parametrize(("t", "k", "c"), [(1, 1, 1), (16, 16, 32), (33, 17, 100), (257, 5, 16)])
def test_ragged_shapes(t, k, c, device):
    dy, x, _, on_device = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "random")
    grad, bias = module.linear_wgrad(
        *on_device, chosen.order(device), chosen.count(device), chosen.n_active, True
    )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)


def test_a_count_that_changes_is_read_on_the_device(device):
    t, k, c = 40, 20, 30
    dy, x, _, on_device = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "all")
    order, count = chosen.order(device), chosen.count(device)
    for mask in ("random", "one", "none", "all"):
        chosen.set(MASKS[mask](k))
        grad, bias = module.linear_wgrad(*on_device, order, count, k, True, splits=2, tiles=SMALL)
        assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
        assert_gradient(bias, dy.double().sum(0), chosen, t)


def test_nan_of_a_frozen_feature_reaches_nothing(device):
    t, k, c = 40, 20, 30
    dy, x, _, (dy_d, x_d, weight_d) = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "random")
    dy_d[:, chosen.frozen.to(dy_d.device)] = float("nan")
    grad, bias = module.linear_wgrad(
        dy_d, x_d, weight_d, chosen.order(device), chosen.count(device), chosen.n_active, True
    )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)


def test_bits_do_not_change_from_run_to_run(device):
    t, k, c = 200, 30, 40
    *_, on_device = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "random")
    arguments = (*on_device, chosen.order(device), chosen.count(device), chosen.n_active, True)
    runs = [module.linear_wgrad(*arguments, splits=4, tiles=SMALL) for _ in range(3)]
    for grad, bias in runs[1:]:
        assert torch.equal(grad, runs[0][0])
        assert torch.equal(bias, runs[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_that_are_not_aligned(dtype, device):
    """Triton compiles for multiples of 16 where it finds them: here it must find none."""
    t, k, c = 32, 16, 32
    dy, x, weight, _ = linear_operands(t + 1, k + 1, c + 1, dtype, device)
    dy, x = dy[1:, 1:], x[1:, 1:]
    on_device = dy.to(device), x.to(device), weight[1:, 1:].to(device)
    shifted = [torch.empty(n.numel() + 1, dtype=dtype, device=device)[1:] for n in on_device[:2]]
    placed = [s.view(n.shape).copy_(n) for s, n in zip(shifted, on_device[:2], strict=True)]
    chosen = channels(k, "random")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    for dy_d, x_d in (placed, on_device[:2]):
        grad, bias = module.linear_wgrad(
            dy_d, x_d, on_device[2], order, count, n, True, splits=2, tiles=SMALL
        )
        assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
        assert_gradient(bias, dy.double().sum(0), chosen, t)


@pytest.mark.parametrize("splits", [1, 3])
def test_offsets_of_64_bits(splits, device, monkeypatch):
    """What tensors of more than 2**31 elements take, on small ones."""
    monkeypatch.setattr(module, "is_wide", lambda *_: True)
    t, k, c = 70, 37, 45
    dy, x, _, on_device = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "random")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    grad, _ = module.linear_wgrad(*on_device, order, count, n, True, splits=splits, tiles=SMALL)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)


def test_a_tensor_is_wide_where_32_bits_cannot_say_how_far_its_elements_lie_apart():
    one = torch.empty(1, device="meta")
    assert not tiles_module.is_wide(one.expand(2**31))
    assert not tiles_module.is_wide(torch.empty(2**31, device="meta"))
    assert tiles_module.is_wide(one, torch.empty(2**31 + 1, device="meta"))
    assert tiles_module.is_wide(torch.empty(2**16, 2**16, device="meta"))
