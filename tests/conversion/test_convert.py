"""convert and revert: the same model, its layers changed in place, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.models import OwnLinear, Scaled, converted, entries, small_net

STOCK = [
    nn.Linear(3, 4),
    nn.Conv1d(3, 4, 2),
    nn.Conv2d(3, 4, 2),
    nn.Conv3d(3, 4, 2),
    nn.ConvTranspose1d(3, 4, 2),
    nn.ConvTranspose2d(3, 4, 2),
    nn.ConvTranspose3d(3, 4, 2),
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.GroupNorm(2, 4),
    nn.LayerNorm(4),
    nn.RMSNorm(4),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm1d(4, affine=True),
    nn.InstanceNorm2d(4, affine=True),
    nn.InstanceNorm3d(4, affine=True),
    nn.Bilinear(2, 3, 4),
]


@pytest.mark.parametrize("layer", STOCK, ids=lambda layer: type(layer).__name__)
def test_each_stock_type_keeps_its_identity(layer):
    layer = copy.deepcopy(layer)
    before, stock = dict(layer.named_parameters()), type(layer)
    assert neq.convert(layer) is layer
    assert isinstance(layer, NeuronLayer)
    assert isinstance(layer, stock)
    assert type(layer).__name__ == stock.__name__
    assert dict(layer.named_parameters()) == before
    assert all(p is before[n] for n, p in layer.named_parameters())
    assert len(layer.channels) == layer.channels.n_active == 4
    assert neq.revert(layer) is layer
    assert type(layer) is stock


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: neq.convert(nn.ReLU()), ValueError, "at least one layer that can be converted"),
        (
            lambda: neq.convert(nn.Sequential(OwnLinear(3, 4))),
            ValueError,
            r"(?s)got none:.*0 +OwnLinear +not converted: a subclass of Linear with its own forwa",
        ),
        (lambda: neq.convert(nn.Linear(3, 4), filter=lambda *_: False), ValueError, "got none"),
        (lambda: neq.convert(torch.ones(3)), TypeError, r"model: expected .*Module, got Tensor"),
        (lambda: neq.convert(nn.Linear(3, 4), grad_input="all"), ValueError, "grad_input: .*'all'"),
        (lambda: neq.convert(nn.Linear(3, 4), others="stop"), ValueError, "others: .*'stop'"),
        (lambda: neq.verify(nn.Linear(3, 4), torch.ones(2, 3)), ValueError, "call convert"),
        (lambda: neq.specialize(nn.Linear(3, 4)), ValueError, "call convert"),
    ],
)
def test_bad_calls_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(OwnLinear(3, 4), nn.Linear(4, 4))
    for options in ({"filter": lambda *_: False}, {"grad_input": "some"}, {"others": "none"}):
        with pytest.raises(ValueError):
            neq.convert(model, **options)
        assert [type(m) for m in model] == [OwnLinear, nn.Linear]
        assert [set(vars(m)) for m in model] == [set(vars(nn.Linear(3, 4)))] * 2


def test_converting_twice_does_nothing():
    model = neq.convert(small_net())
    model[0].channels.set([1, 2])
    before = [(m, type(m), getattr(m, "channels", None)) for m in model.modules()]
    neq.convert(model, grad_input="active")
    after = [(m, type(m), getattr(m, "channels", None)) for m in model.modules()]
    assert all(
        a is b for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert model[0].channels.n_active == 2
    assert model[0].grad_input == "exact"


def test_converting_twice_with_followers_does_nothing():
    model = neq.convert(Scaled(), others="follow")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    neq.convert(model, others="follow")
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_what_is_added_later_is_converted_later():
    model = neq.convert(small_net())
    first = model[0].channels
    model.append(nn.Linear(5, 3))
    assert entries(model)["5"].reason == "convert was not called, or left it out"
    neq.convert(model)
    assert converted(model) == ["0", "1", "4", "5"]
    assert model[0].channels is first


@pytest.mark.parametrize("others", ["train", "follow"])
def test_revert_leaves_nothing_behind(others):
    plain = nn.Sequential(Scaled(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    state = [dict(vars(m)) for m in plain.modules()]
    types = [type(m) for m in plain.modules()]
    neq.convert(plain, others=others)
    plain[2].channels.set([])
    neq.revert(plain)
    assert [type(m) for m in plain.modules()] == types
    for module, before in zip(plain.modules(), state, strict=True):
        assert set(vars(module)) == set(before)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    plain(torch.randn(3, 4)).square().sum().backward()
    assert bool(plain[2].weight.grad.ne(0).any())
    neq.revert(plain)


def test_hooks_optimizers_and_references_survive():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    conv, weight, calls = model[0], model[0].weight, []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    weight.register_post_accumulate_grad_hook(lambda _: calls.append("gradient"))
    x = torch.randn(2, 3, 5, 5)
    model(x).sum().backward()
    optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    neq.convert(model)
    assert model[0] is conv
    assert conv.weight is weight
    for _ in range(2):
        calls.clear()
        optimizer.zero_grad()
        model(x).sum().backward()
        assert calls == ["before", "forward", "gradient"]
        assert weight.grad is not None
        optimizer.step()
        assert optimizer.state[weight]["momentum_buffer"] is buffer
        neq.revert(model)


def test_a_filtered_second_convert_keeps_the_first():
    model = neq.convert(small_net(), filter=lambda name, _: name == "0")
    model[0].channels.set([3])
    neq.convert(model, filter=lambda name, _: name == "4")
    assert converted(model) == ["0", "4"]
    assert model[0].channels.n_active == 1


def test_specialize_is_a_switch():
    model = small_net()
    neq.convert(model)
    assert neq.specialize(model) is model
    assert all(layer.specialized for _, layer in named_neuron_layers(model))
    neq.specialize(model, enabled=False)
    assert not any(layer.specialized for _, layer in named_neuron_layers(model))
