"""Wholly frozen layers under a process group: adopted ones train on, others say what is missing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.constructed import LAYERS, Scaled, constructed, image, net, picture


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MESSAGE = r"wholly frozen under a process group.*call neq\.convert\(model\) before wrapping"


@pytest.mark.parametrize(
    "name", sorted(LAYERS.keys() - {"SyncBatchNorm"})
)  # on CPUs it has no group
@pytest.mark.parametrize("below_learns", [True, False])
@pytest.mark.usefixtures("process_group")
def test_a_wholly_frozen_layer_on_its_own_raises(name, below_learns):
    layer, x = constructed(name), image(name)
    x.requires_grad_(below_learns and x.is_floating_point())
    layer(x).sum().backward()
    layer.channels.set([])
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match=MESSAGE):
            same(x)
    with torch.no_grad():
        layer(x)
    layer.channels.set([1])
    layer(x).sum().backward()
    layer.channels.set([])
    layer.requires_grad_(False)
    layer(x)
    neq.convert(layer.requires_grad_(True))(x)


@pytest.mark.usefixtures("process_group")
def test_without_convert_data_parallel_training_raises_in_forward():
    model = net(neq.nn)
    wrapped = DistributedDataParallel(model)
    wrapped(picture()).sum().backward()
    model[0].channels.set([])
    with pytest.raises(RuntimeError, match=MESSAGE):
        wrapped(picture())


def adopted():
    return neq.convert(net(neq.nn))


def joined():
    """Layers that were converted one by one, then together."""
    return neq.convert(
        nn.Sequential(*(neq.convert(m) if isinstance(m, NeuronLayer) else m for m in net(neq.nn)))
    )


def with_followers():
    block = neq.convert(nn.Sequential(Scaled(), neq.nn.Linear(4, 2)), others="follow")
    return neq.convert(nn.Sequential(nn.Flatten(), neq.convert(nn.Linear(75, 4)), block))


@pytest.mark.parametrize("make", [adopted, joined, with_followers])
@pytest.mark.usefixtures("process_group")
def test_adopted_layers_stop_and_start_in_data_parallel_training(make):
    model = make()
    wrapped = DistributedDataParallel(model)
    *hidden, (_, head) = named_neuron_layers(model)
    for n_frozen in (0, len(hidden), 2, len(hidden), 0):
        for i, (_, layer) in enumerate(hidden):
            layer.channels.set([] if i < n_frozen else range(len(layer.channels)))
        model.zero_grad()
        wrapped(picture()).square().sum().backward()
        for parameter, _ in head.neuron_parameters():
            assert bool(parameter.grad.ne(0).any())
        for _, layer in hidden[:n_frozen]:
            assert all(bool((p.grad == 0).all()) for p in layer.parameters())


@pytest.mark.parametrize("below_learns", [True, False])
@pytest.mark.usefixtures("process_group")
def test_hooks_of_a_wholly_frozen_layer_see_zeros(below_learns):
    model = adopted()
    model[0].requires_grad_(below_learns)
    layer, seen = model[1], []
    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: seen.append(float(grad.norm())))
    layer.channels.set([])
    DistributedDataParallel(model)(picture()).square().sum().backward()
    assert seen == [0.0] * len(list(layer.parameters()))


class Towers(nn.Module):
    """The second runs last, beside the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.first(x) * self.second(x)


@pytest.mark.parametrize("finds_unused", [False, True])
@pytest.mark.usefixtures("process_group")
def test_a_frozen_tower_that_runs_last_needs_find_unused_parameters(finds_unused):
    model = neq.convert(Towers())
    wrapped = DistributedDataParallel(model, find_unused_parameters=finds_unused)
    model.second.channels.set([])
    wrapped(torch.ones(3, 4)).sum().backward()
    if finds_unused:
        wrapped(torch.ones(3, 4)).sum().backward()
        assert bool(model.first.weight.grad.ne(0).any())
    else:
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            wrapped(torch.ones(3, 4))
