"""verify finds parameters whose gradients are not masked, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.models import Bypassing, small_net


def test_verify_finds_layers_that_are_bypassed():
    assert neq.verify(neq.convert(Bypassing()), torch.randn(3, 4)) == [
        "bypassed.weight",
        "bypassed.bias",
    ]


def test_verify_says_what_the_dense_gradients_cost():
    dense = neq.verify(neq.convert(Bypassing()), torch.randn(3, 4))
    assert dense.macs == {"bypassed.weight": 3 * 16, "bypassed.bias": 0}
    assert dense.total_macs == 2 * 3 * 16
    assert dense.share == 0.5
    assert str(dense).splitlines() == [
        "bypassed.weight  48 MACs",
        "bypassed.bias    0 MACs",
        "computed dense: 50.0% of 96 MACs",
    ]


def test_a_projection_that_starts_at_zero_hides_nothing():
    model = nn.Sequential(Bypassing(), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    assert neq.verify(neq.convert(model), torch.randn(3, 4)) == [
        "0.bypassed.weight",
        "0.bypassed.bias",
    ]


def test_a_layer_that_training_skips_at_random_is_found():
    class LayerDrop(Bypassing):
        def forward(self, x):
            return x if self.training else super().forward(x)

    model = neq.convert(nn.Sequential(nn.Linear(4, 4), LayerDrop()))
    assert neq.verify(model.train(), torch.randn(3, 4)) == ["1.bypassed.weight", "1.bypassed.bias"]
    assert all(module.training for module in model.modules())


def test_a_part_that_only_training_has_is_found():
    class Auxiliary(Bypassing):
        def forward(self, x):
            return super().forward(x) if self.training else x

    model = neq.convert(nn.Sequential(nn.Linear(4, 4), Auxiliary()))
    found = neq.verify(model.eval(), torch.randn(3, 4))
    assert found == ["1.bypassed.weight", "1.bypassed.bias"]
    assert not found.share


def test_a_model_that_refuses_another_mode_is_verified_in_its_own():
    class OnlyTraining(Bypassing):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("no targets")
            return super().forward(x)

    assert len(neq.verify(neq.convert(OnlyTraining()), torch.randn(3, 4))) == 2
    with pytest.raises(RuntimeError, match="no targets"):
        neq.verify(neq.convert(OnlyTraining()).eval(), torch.randn(3, 4))


@pytest.mark.parametrize(
    "example", [torch.randn(3, 4), (torch.randn(3, 4),), {"x": torch.randn(3, 4)}]
)
def test_verify_takes_tensors_tuples_and_dicts(example):
    assert len(neq.verify(neq.convert(Bypassing()), example)) == 2


def test_verify_needs_something_to_learn():
    model = neq.convert(nn.Linear(3, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="output that needs a gradient, got none"):
        neq.verify(model, torch.randn(2, 3))


def test_verify_works_with_gradients_off():
    with torch.no_grad():
        assert neq.verify(neq.convert(nn.Linear(3, 4)), torch.randn(2, 3)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_verify_leaves_everything_as_it_was(fails):
    model = neq.convert(small_net())
    model.insert(3, nn.Dropout(0.5))
    model[0].channels.set([])
    model[1].eval()
    x, misfit = torch.randn(2, 3, 5, 5), torch.randn(2, 7, 5, 5)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    buffers = [b.clone() for b in model.buffers()]
    parameters = [(p.clone(), p.data_ptr(), p._version) for p in model.parameters()]
    masks = [layer.channels.mask for _, layer in named_neuron_layers(model)]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            neq.verify(model, misfit)
    else:
        assert neq.verify(model, x) == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    for layer, mask in zip((m for _, m in named_neuron_layers(model)), masks, strict=True):
        assert torch.equal(layer.channels.mask, mask)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)
    for parameter, before in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(parameter, before[0])
        assert (parameter.data_ptr(), parameter._version) == before[1:]
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
