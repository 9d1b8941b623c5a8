"""Whole models with peer 1's backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from benchmarks.common.workloads import random_masks
from benchmarks.steps import peers
from benchmarks.steps.correctness import differences
from tests.support.step_workloads import TINY


def pair(layout: str = "nchw"):
    workload = TINY["tiny"]
    models = {"dense": workload.model(layout), "peer": peers.convert(workload.model(layout))}
    return models, neq.convert(workload.model(layout)), workload.batches(layout)[0]


def gate(models, masks, batch):
    return differences(
        models, masks, batch, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("r", [1.0, 0.5, 0.1, 0.0])
def test_gradients_are_dense_in_active_rows_and_zero_elsewhere(layout, r):
    models, converted, batch = pair(layout)
    masks = random_masks(converted, r)
    peers.set_active(models["peer"], masks, others=r > 0)
    assert gate(models, masks, batch) == {}


def test_masks_may_change_and_come_back():
    models, converted, batch = pair()
    for r in (0.0, 0.5, 0.0, 1.0):
        masks = random_masks(converted, r)
        peers.set_active(models["peer"], masks, others=r > 0)
        assert gate(models, masks, batch) == {}
    assert all(p.requires_grad for p in models["peer"].parameters())


def test_all_frozen_layers_need_no_gradient():
    models, converted, _ = pair()
    peers.set_active(models["peer"], random_masks(converted, 0.0), others=False)
    learning = {name for name, p in models["peer"].named_parameters() if p.requires_grad}
    assert learning == {"8.weight", "8.bias"}


def test_what_peer_1_cannot_do_raises():
    model = peers.convert(nn.Sequential(nn.ConvTranspose2d(2, 4, 3)))
    with pytest.raises(ValueError, match="ConvTranspose2d cannot be partly frozen"):
        peers.set_active(model, {"0": torch.tensor([1])})
    with pytest.raises(ValueError, match="nowhere"):
        peers.set_active(model, {"nowhere": torch.tensor([1])})
