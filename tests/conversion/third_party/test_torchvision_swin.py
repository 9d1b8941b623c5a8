"""torchvision's Swin, whose attention uses weights without calling their layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision.models.swin_transformer import ShiftedWindowAttention

import neq_kernels as neq
from tests.support import oracle
from tests.support.models import converted, output_of, tiny_swin


def test_swin_masks_every_row_of_its_attention():
    """torchvision's attention uses its weights without calling the layers; ours calls them."""
    model = tiny_swin()
    plain = copy.deepcopy(model)
    assert {"qkv", "proj"} <= {n.split(".")[-1] for n in converted(neq.convert(model))}
    attention = [m for m in model.modules() if isinstance(m, ShiftedWindowAttention)]
    assert len(attention) == 4
    assert all(type(m) is not ShiftedWindowAttention for m in attention)
    for block in attention:
        block.qkv.channels.set([1, 7])
        block.proj.channels.set([0])
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for block in attention:
        for layer, rows in ((block.qkv, [1, 7]), (block.proj, [0])):
            mask = [i in rows for i in range(len(layer.channels))]
            oracle.assert_frozen_are_zero(layer.weight.grad, mask)
            oracle.assert_frozen_are_zero(layer.bias.grad, mask)
            assert bool(layer.weight.grad[rows].ne(0).any())
    tables = [n for n, _ in model.named_parameters() if n.endswith("position_bias_table")]
    assert neq.verify(model, torch.randn(2, 3, 32, 32)) == tables
    assert [e.name for e in neq.conversion_report(model).others] == tables
    neq.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("size", [16, 20, 24, 36])
@pytest.mark.parametrize("training", [True, False])
def test_swin_is_torchvisions_bit_for_bit(size, training):
    """Windows as large as the image, images that need padding, shifted windows, dropout."""
    plain = tiny_swin(attention_dropout=0.1).train(training)
    ours = neq.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, size, size + 4)
    assert torch.equal(output_of(ours, x), output_of(plain, x))
