"""Every layer: PyTorch's own outputs and state, with gradients of active neurons only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.norm import _Norm
from tests.support import oracle
from tests.support.layer_cases import LAYERS, assert_masked, calls_of_a_step, every_layer, twins


@every_layer
@pytest.mark.parametrize("mask", [oracle.ragged, oracle.half, lambda k: [True] * k])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_state_and_gradients(name, mask, training):
    plain, ours, x = twins(name, mask)
    plain.train(training)
    ours.train(training)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(t) for layer, t in zip((plain, ours), inputs, strict=True)]
    assert torch.equal(*outs)
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    assert_masked(ours, plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@every_layer
def test_wholly_frozen(name):
    plain, ours, x = twins(name, lambda k: [False] * k)
    out = ours(x)
    assert torch.equal(out, plain(x))
    assert not out.requires_grad
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), "running statistics of a frozen norm layer go on"
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(t) for layer, t in zip((plain, ours), inputs, strict=True)]
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    assert all(p.grad is None for p in ours.parameters())


@every_layer
def test_channel_dim_enumerates_the_neurons(name):
    """Moving one neuron's parameters moves its channel of the output, and no other."""
    _, ours, x = twins(name)
    ours.eval()
    before = ours(x).detach()
    dim = ours.channel_dim(before)
    k = len(ours.channels)
    assert before.shape[dim] == k
    chosen = torch.tensor([k // 2])
    with torch.no_grad():
        for parameter, layout in ours.neuron_parameters():
            layout.scatter_(parameter, chosen, layout.gather(parameter, chosen) + 1)
    moved = (ours(x) != before).movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)
    assert moved.tolist() == [i == k // 2 for i in range(k)]


@every_layer
def test_neuron_parameters_are_the_parameters(name):
    _, ours, _ = twins(name)
    owned = ours.neuron_parameters()
    assert [p for p, _ in owned] == list(ours.parameters())
    assert all(layout.n_neurons(p) == len(ours.channels) for p, layout in owned)
    assert ours.is_norm == ("norm" in name)


@every_layer
def test_repr_adds_the_active_count(name):
    plain, ours, _ = twins(name, oracle.half)
    k = len(ours.channels)
    assert repr(ours) == f"{repr(plain)[:-1]}, active={(k + 1) // 2}/{k})"


@every_layer
def test_gradients_off(name):
    plain, ours, x = twins(name, oracle.half)
    with torch.no_grad():
        out = ours(x)
    assert torch.equal(out, plain(x))
    assert out.grad_fn is None


@every_layer
@pytest.mark.usefixtures("stock_algorithms")
def test_with_everything_active_a_step_is_pytorchs_own_calls(name):
    plain, ours, x = twins(name)
    with selector.forced_strategy(Strategy.DENSE):
        assert calls_of_a_step(ours, x) == calls_of_a_step(plain, x)


@every_layer
@pytest.mark.usefixtures("stock_algorithms")
def test_wholly_frozen_a_step_is_that_of_a_layer_that_needs_no_gradient(name):
    plain, ours, x = twins(name, lambda k: [False] * k)
    plain.requires_grad_(False)
    assert calls_of_a_step(ours, x) == calls_of_a_step(plain, x)


def test_masking_does_not_depend_on_the_mode():
    layer = neq.convert(nn.Linear(3, 4)).eval()
    layer.channels.set([1, 2])
    layer(torch.ones(2, 3)).sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [False, True, True, False])
    assert bool(layer.weight.grad[1:3].ne(0).all())


@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_requires_grad_of_single_parameters(learns):
    for make, shape in (LAYERS["linear"], LAYERS["conv2d grouped"], LAYERS["layer_norm"]):
        layer = neq.convert(make())
        layer.weight.requires_grad_(learns[0])
        layer.bias.requires_grad_(learns[1])
        layer.channels.set(oracle.half(len(layer.channels)))
        out = layer(torch.randn(shape))
        assert out.requires_grad == any(learns)
        if any(learns):
            out.sum().backward()
        for parameter, learned in zip((layer.weight, layer.bias), learns, strict=True):
            assert (parameter.grad is not None) == learned


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mask", [oracle.half, lambda k: [False] * k, lambda k: [True] * k])
def test_in_place_activations_follow(name, mask):
    plain, ours, x = twins(name, mask)
    k = len(ours.channels)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = []
    for layer, t in zip((plain, ours), inputs, strict=True):
        out = nn.functional.relu(layer(t).mul_(2), inplace=True)
        out.sum().backward()
        outs.append(out)
    assert torch.equal(*outs)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    if any(mask(k)):
        assert_masked(ours, plain)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before", [lambda k: [True] * k, oracle.half])
def test_a_change_between_forward_and_backward_raises(name, before):
    make, shape = LAYERS[name]
    layer = neq.convert(make())
    k = len(layer.channels)
    layer.channels.set(before(k))
    out = nn.functional.relu(layer(torch.randn(shape)), inplace=True)
    noticed_by_autograd = isinstance(layer, _Norm) and layer.channels.n_active < k
    layer.channels.set([0])
    message = "changed between its forward and its backward"
    if noticed_by_autograd:
        message = "modified by an inplace operation.*Bool"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
