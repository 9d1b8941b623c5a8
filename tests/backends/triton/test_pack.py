"""Gathering active channels, and scattering rows into a whole gradient."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.channels import NeuronLayout
from tests.support.backends import aten, triton
from tests.support.gpu_cases import DTYPES, MASKS, assert_gradient, channels, poison
from tests.support.wgrad_operands import LAYOUTS


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_a_matrix(dtype, mask, device):
    dy = torch.randn(75, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = channels(90, mask)
    order, n = chosen.order(device), chosen.n_active
    assert torch.equal(triton.pack(dy.to(device), order, n, 1).cpu(), dy[:, chosen.active])
    packed, sums = triton.pack_and_sum(dy.to(device), order, n, 1)
    assert torch.equal(packed.cpu(), dy[:, chosen.active])
    if n:
        exact = dy[:, chosen.active].double().sum(0)
        assert_gradient(sums, exact, channels(n, "all"), len(dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_images_keep_their_memory_format(dtype, layout, device):
    dy = torch.randn(2, 20, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    dy = dy.contiguous(memory_format=LAYOUTS[layout])
    chosen = channels(20, "random")
    packed, sums = triton.pack_and_sum(dy.to(device), chosen.order(device), chosen.n_active, 1)
    assert torch.equal(packed.cpu(), dy[:, chosen.active])
    assert packed.is_contiguous(memory_format=LAYOUTS[layout])
    assert (sums is not None) == (layout == "nhwc")
    if sums is not None:
        exact = dy[:, chosen.active].double().sum((0, 2, 3))
        assert_gradient(sums, exact, channels(chosen.n_active, "all"), 70)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(37,), (37, 45), (21, 3, 2, 2), (9, 300)], ids=str)
def test_rows(shape, mask, device):
    k = shape[0]
    chosen = channels(k, mask)
    like = torch.zeros(shape)
    rows = torch.randn(chosen.n_active, *shape[1:], generator=torch.Generator().manual_seed(0))
    poison(device)
    order, n = chosen.order(device), chosen.n_active
    out = triton.scatter_rows(rows.to(device), like.to(device), order, n, NeuronLayout())
    expected = aten.scatter_rows(rows, like, chosen.order(), n, NeuronLayout())
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_channels_last_weight_are_rounded_to_its_dtype(dtype, device):
    last = {"memory_format": torch.channels_last}
    like = torch.zeros(12, 5, 3, 2, dtype=dtype).contiguous(**last)
    chosen = channels(12, "random")
    rows = torch.randn(chosen.n_active, 5, 3, 2).contiguous(**last)
    order, n = chosen.order(device), chosen.n_active
    out = triton.scatter_rows(rows.to(device), like.to(device), order, n, NeuronLayout())
    assert out.stride() == like.stride()
    expected = aten.scatter_rows(rows, like, chosen.order(), n, NeuronLayout())
    assert torch.equal(out.cpu(), expected)
