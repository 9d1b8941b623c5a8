"""Layers of other libraries beside their converted copies."""

from __future__ import annotations

import copy

import torch
from torch.utils._pytree import tree_leaves

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners


def outcome(layer, *inputs):
    """Outputs and every gradient of one step."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(3)
    out = [t for t in tree_leaves(layer(*inputs)) if isinstance(t, torch.Tensor)]
    layer.zero_grad()
    loss = sum((t.double() ** 2).sum() for t in out if t.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    return out, [x.grad for x in inputs], {n: p.grad for n, p in layer.named_parameters()}


def assert_holds(plain, *inputs, exact=True):
    """The converted layer computes what the plain one does; with every third neuron frozen its
    gradients are the dense ones but for exact zeros; frozen wholly, there are none; in a graph of
    torch.fx it stays one layer; it reverts."""
    kind = type(plain)
    ours = neq.convert(copy.deepcopy(plain))
    assert isinstance(ours, NeuronLayer), neq.conversion_report(ours)
    outputs, inner, dense = outcome(plain, *inputs)
    layers = [layer for _, layer in named_neuron_layers(ours)]
    for layer in layers:
        k = len(layer.channels)
        layer.channels.set([i % 3 != 1 for i in range(k)] if k > 1 else [True])
    owners = neuron_owners(ours)
    assert {n for n, p in ours.named_parameters() if p in owners}
    same = torch.equal if exact else torch.allclose
    our_outputs, our_inner, grads = outcome(ours, *inputs)
    for a, b in zip(our_outputs, outputs, strict=True):
        assert same(a, b)
    for a, b in zip(our_inner, inner, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for name, parameter in ours.named_parameters():
        expected = dense[name]
        if parameter in owners and expected is not None:
            ((channels, layout),) = owners[parameter]
            expected = expected.clone()
            layout.fill_(expected, channels.frozen, 0)
            assert bool((layout.gather(grads[name], channels.frozen) == 0).all()), name
            assert bool(layout.gather(dense[name], channels.active).ne(0).any()), name
        torch.testing.assert_close(grads[name], expected, rtol=1e-9, atol=1e-12)
    for layer in layers:
        layer.channels.set([])
    assert all(
        g is None for n, g in outcome(ours, *inputs)[2].items() if n in dense and _owned(ours, n)
    )
    if len(inputs) == 1:
        traced = torch.fx.symbolic_trace(torch.nn.Sequential(ours))
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
        torch.manual_seed(3)
        for a, b in zip(tree_leaves(traced(*inputs)), outputs, strict=True):
            assert same(a, b)
    assert type(neq.revert(ours)) is kind
    assert set(vars(ours)) == set(vars(plain))
    assert list(ours._modules) == list(plain._modules)
    return ours


def _owned(model, name):
    return model.get_parameter(name) in neuron_owners(model)
