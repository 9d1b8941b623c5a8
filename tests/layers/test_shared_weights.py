"""Weights that layers share, and layers that are called twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle
from tests.support.layer_cases import Tied, assert_masked, through_a_file


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, through_a_file])
def test_layers_that_share_a_weight_share_their_channels(copied):
    plain = Tied().double()
    ours = copied(neq.convert(copy.deepcopy(plain)))
    assert ours.first.channels is ours.second.channels
    assert ours.first.weight is ours.second.weight
    mask = [True, False, False, True]
    ours.first.channels.set(mask)
    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for parameter, dense in zip(ours.parameters(), plain.parameters(), strict=True):
        oracle.assert_close64(parameter.grad, oracle.zero_frozen(dense.grad, mask), 1e-12)
        oracle.assert_frozen_are_zero(parameter.grad, mask)


def test_one_layer_called_twice():
    plain = nn.Linear(4, 4).double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.channels.set([0, 3])
    x = torch.randn(3, 4, dtype=torch.float64)
    for layer in (plain, ours):
        layer(layer(x)).square().sum().backward()
    assert_masked(ours, plain)


def test_a_layer_tied_to_one_left_alone_is_left_alone():
    """Its weight gets a dense gradient from the other one, whatever its own mask."""
    model = nn.Sequential(Tied(), nn.Linear(4, 2))
    neq.convert(model, filter=lambda name, _: name != "0.second")
    assert [name for name, _ in named_neuron_layers(model)] == ["1"]
    neq.convert(model)
    assert model[0].first.channels is model[0].second.channels
