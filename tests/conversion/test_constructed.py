"""convert, conversion_report and revert on layers constructed from neq.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle
from tests.support.constructed import (
    Scaled,
    assert_same,
    constructed,
    every_layer,
    image,
    net,
    set_masks,
    step,
    stock,
)


@pytest.mark.parametrize(
    "options", [{}, {"filter": lambda *_: False}, {"norms": False}], ids=["all", "filter", "norms"]
)
def test_convert_adopts_whatever_filter_and_norms_say(options):
    model = nn.Sequential(net(neq.nn), nn.Linear(3, 3), nn.BatchNorm1d(3))
    ours = [layer for _, layer in named_neuron_layers(model)]
    set_masks(model, 2)
    channels, masks = [m.channels for m in ours], [m.channels.mask for m in ours]
    assert neq.convert(model, grad_input="active", **options) is model
    layers = [layer for _, layer in named_neuron_layers(model)]
    assert layers[: len(ours)] == ours
    assert len(layers) - len(ours) == {0: 2, "filter": 0, "norms": 1}[next(iter(options), 0)]
    assert len({id(layer.anchor) for layer in layers}) == 1
    assert layers[0].anchor.shared
    assert {layer.grad_input for layer in layers} == {"active"}
    for layer, known, mask in zip(ours, channels, masks, strict=True):
        assert layer.channels is known
        assert torch.equal(known.mask, mask)


def test_what_is_adopted_keeps_its_options():
    model = neq.convert(nn.Sequential(nn.Linear(3, 3), neq.nn.Linear(3, 3)), grad_input="active")
    anchor = model[0].anchor
    neq.specialize(model)
    model.append(neq.nn.Linear(3, 2))
    neq.convert(model)
    assert [layer.grad_input for layer in model] == ["active", "active", "exact"]
    assert [layer.specialized for layer in model] == [True, True, False]
    assert all(layer.anchor is anchor for layer in model)


def test_the_filter_is_not_asked_about_constructed_layers():
    asked = []
    model = nn.Sequential(neq.nn.Linear(3, 3), nn.Linear(3, 3))
    neq.convert(model, filter=lambda name, _: bool(asked.append(name)) or True)
    assert asked == ["1"]


def test_others_follow_constructed_layers():
    model = neq.convert(nn.Sequential(Scaled(), neq.nn.Linear(4, 2)), others="follow")
    model[0].linear.channels.set([])
    model(torch.randn(3, 4)).sum().backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learned == ["1.weight", "1.bias"]


@pytest.mark.parametrize("adopt", [lambda m: m, neq.convert], ids=["constructed", "adopted"])
def test_the_report_counts_them_as_converted(adopt):
    ours, converted = adopt(net(neq.nn)), neq.convert(net(nn))
    assert neq.conversion_report(ours) == neq.conversion_report(converted)
    assert all(entry.converted for entry in neq.conversion_report(ours).modules)


@every_layer
@pytest.mark.parametrize("adopt", [lambda m: m, neq.convert], ids=["constructed", "adopted"])
def test_revert_leaves_torchs_layer(name, adopt):
    layer, plain = adopt(constructed(name)), stock(name)
    layer.channels.set([])
    neq.specialize(layer)
    assert neq.revert(layer) is layer
    assert type(layer) is type(plain)
    assert vars(layer).keys() == vars(plain).keys()
    assert_same(step(layer, image(name)), step(plain, image(name)))
    assert len(neq.convert(layer).channels) == 6


# --- shared weights ------------------------------------------------------------------------------


def tied(first, second):
    second.weight = first.weight
    return nn.Sequential(first, second)


def test_constructed_layers_that_share_a_weight_share_the_union_of_their_masks():
    model = tied(neq.nn.Linear(4, 4, bias=False), neq.nn.Linear(4, 4, bias=False))
    model[0].channels.set([0, 1])
    model[1].channels.set([1, 3])
    first, second = model[0].channels, model[1].channels
    assert {c for c, _ in neuron_owners(model)[model[0].weight]} == {first, second}
    neq.convert(model)
    assert model[0].channels is model[1].channels is first
    assert first.mask.tolist() == [True, True, False, True]
    model(torch.randn(3, 4)).square().sum().backward()
    oracle.assert_frozen_are_zero(model[0].weight.grad, first.mask.tolist())
    assert bool(model[0].weight.grad[[0, 1, 3]].ne(0).all())


def test_tied_layers_that_convert_has_not_seen_cannot_be_attached():
    model = tied(neq.nn.Linear(4, 4, bias=False), neq.nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"for 0 and 1, which share .*call neq\.convert"):
        neq.attach(optimizer, model)
    neq.attach(optimizer, neq.convert(model))


def test_a_torch_layer_joins_the_channels_of_the_constructed_one():
    model = tied(nn.Conv2d(4, 4, 3), neq.nn.Conv2d(4, 4, 3))
    model[1].channels.set([2])
    channels = model[1].channels
    neq.convert(model)
    assert model[0].channels is model[1].channels is channels
    assert channels.n_active == 1


def test_layers_that_see_other_neurons_in_a_weight_keep_their_channels():
    model = tied(neq.nn.Conv2d(4, 4, 3), neq.nn.ConvTranspose2d(4, 4, 3))
    model[0].channels.set([1])
    neq.convert(model)
    assert model[0].channels is not model[1].channels
    assert [layer.channels.n_active for layer in model] == [1, 4]
