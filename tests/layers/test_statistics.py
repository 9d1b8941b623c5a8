"""Running statistics of wholly frozen batch norm: updated as in torch.nn, or held."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

import neq_kernels as neq

NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "BatchNormAct2d": lambda: BatchNormAct2d(4),
}


def seen(norm):
    """Train on two batches, so that there are statistics."""
    for seed in range(2):
        norm(torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1)
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_held_while_none_is_active(name):
    norm = seen(neq.convert(NORMS[name](), frozen_statistics="hold"))
    norm.channels.set([])
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(3, 4, 5, 5)
    out = norm(x)
    assert norm.training
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(out, copy.deepcopy(norm).eval()(x))
    norm.channels.set([2])
    plain = neq.revert(copy.deepcopy(norm))
    assert torch.equal(norm(x), plain(x))
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert not torch.equal(norm.running_mean, before["running_mean"])


@pytest.mark.parametrize("name", NORMS)
def test_updated_by_default(name):
    norm = seen(neq.convert(NORMS[name]()))
    norm.channels.set([])
    plain = neq.revert(copy.deepcopy(norm))
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(norm(x), plain(x))
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in plain.state_dict().items())


def test_without_statistics_there_is_nothing_to_hold():
    norm = neq.convert(nn.BatchNorm1d(4, track_running_stats=False), frozen_statistics="hold")
    norm.channels.set([])
    plain, x = nn.BatchNorm1d(4, track_running_stats=False), torch.randn(5, 4)
    assert torch.equal(norm(x), plain(x))


def test_compiled():
    torch._dynamo.reset()
    norm = seen(neq.convert(nn.BatchNorm2d(4), frozen_statistics="hold"))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 5, 5)
    for active in ([0, 1, 2, 3], [], [1]):
        norm.channels.set(active)
        eager = copy.deepcopy(norm)
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(norm.state_dict(), eager.state_dict())
    torch._dynamo.reset()


def test_a_second_convert_keeps_what_the_first_was_told():
    model = neq.convert(nn.Sequential(nn.BatchNorm1d(4)), frozen_statistics="hold")
    model.append(nn.BatchNorm1d(4))
    neq.convert(model)
    assert [layer.hold_statistics for layer in model] == [True, False]
    neq.revert(model)
    assert "hold_statistics" not in vars(model[0])
    with pytest.raises(
        ValueError, match="frozen_statistics: expected 'update' or 'hold', got 'no'"
    ):
        neq.convert(model, frozen_statistics="no")
