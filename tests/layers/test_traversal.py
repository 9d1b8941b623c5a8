"""Finding a model's layers, and the owners of its parameters."""

from __future__ import annotations

import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.channels import WHOLE_PARAMETER, NeuronLayout
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners, unwrap
from tests.support.layer_cases import Tied, net


def test_named_neuron_layers_in_order_through_wrappers():
    model = neq.convert(net())
    expected = [("0", model[0]), ("1", model[1]), ("4", model[4])]
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        assert unwrap(wrapped) is model
        assert list(named_neuron_layers(wrapped)) == expected
    assert list(named_neuron_layers(net())) == []


def test_neuron_owners_name_every_owned_parameter():
    model = neq.convert(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6))
    )
    owners = neuron_owners(model)
    assert list(owners) == list(model.parameters())
    rows = NeuronLayout()
    layouts = [rows, rows, NeuronLayout(2, axis=1), rows, rows, rows]
    channels = [m.channels for m in model for _ in range(2)]
    assert list(owners.values()) == [[pair] for pair in zip(channels, layouts, strict=True)]


def test_neuron_owners_of_a_tied_weight():
    model = neq.convert(Tied())
    owners = neuron_owners(model)
    assert owners[model.first.weight] == [(model.first.channels, NeuronLayout())]
    assert len(owners) == 3


def test_neuron_owners_know_the_parameters_that_follow():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.linear(x) * self.scale

    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(3, 2)), others="follow")
    owners = neuron_owners(model)
    ((channels, layout),) = owners[model[0].scale]
    assert layout == WHOLE_PARAMETER
    assert channels.n_active == 1
    model[0].linear.channels.set([])
    assert neuron_owners(model)[model[0].scale][0][0].n_active == 0
