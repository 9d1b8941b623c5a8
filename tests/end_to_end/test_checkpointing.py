"""Gradient accumulation and activation checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()


def set_masks(model, mask):
    for _, layer in named_neuron_layers(model):
        layer.channels.set(mask(len(layer.channels)))


def image(batch=4, requires_grad=True):
    return torch.randn(batch, 3, 6, 6, dtype=torch.float64, requires_grad=requires_grad)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(first, second, tolerance=1e-12):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            oracle.assert_close64(a, b, tolerance)
            assert torch.equal(a == 0, b == 0)


# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [oracle.half, oracle.ragged, lambda k: [True] * k])
def test_accumulated_pieces_equal_the_whole(mask):
    model = neq.convert(net())
    set_masks(model, mask)
    x = image(8)
    model(x).square().sum().backward()
    whole = gradients(model)
    model.zero_grad()
    for piece in x.detach().split(2):
        model(piece).square().sum().backward()
    assert_same(gradients(model), whole)


def test_masks_may_change_between_accumulated_pieces():
    """Each backward adds the rows that were active at its forward."""
    plain = net()
    ours = neq.convert(copy.deepcopy(plain))
    pieces = [image(2, requires_grad=False) for _ in range(3)]
    expected = [torch.zeros_like(p) for p in plain.parameters()]
    for j, piece in enumerate(pieces):
        set_masks(ours, lambda k, j=j: [i % 3 == j for i in range(k)])
        ours(piece).square().sum().backward()
        plain.zero_grad()
        plain(piece).square().sum().backward()
        for total, parameter in zip(expected, plain.parameters(), strict=True):
            total += oracle.zero_frozen(parameter.grad, [i % 3 == j for i in range(len(parameter))])
    for parameter, total in zip(ours.parameters(), expected, strict=True):
        oracle.assert_close64(parameter.grad, total, 1e-12)


def test_a_layer_that_freezes_keeps_what_was_accumulated():
    model = neq.convert(net())
    x = image(2, requires_grad=False)
    model(x).square().sum().backward()
    before = gradients(model)
    set_masks(model, lambda k: [False] * k)
    model[5].channels.reset()
    model(x).square().sum().backward()
    after = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(before[:-2], after[:-2], strict=True))
    assert not torch.equal(before[-1], after[-1])


def test_two_forwards_before_two_backwards():
    model = neq.convert(net())
    set_masks(model, oracle.half)
    x, y = image(), image()
    losses = [model(t).square().sum() for t in (x, y)]
    for loss in losses:
        loss.backward()
    together = gradients(model)
    model.zero_grad()
    (model(x).square().sum() + model(y).square().sum()).backward()
    assert_same(gradients(model), together)


def test_a_graph_kept_for_a_second_backward():
    model = neq.convert(net())
    set_masks(model, oracle.half)
    loss = model(image()).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same(gradients(model), [2 * g for g in once])


# --- activation checkpointing --------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("mask", [oracle.half, oracle.ragged, lambda k: [True] * k])
def test_checkpointed_equals_not_checkpointed(reentrant, mask):
    model = neq.convert(net())
    set_masks(model, mask)
    x = image()
    model(x).square().sum().backward()
    expected, dx = gradients(model), x.grad.clone()
    model.zero_grad()
    x.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert_same(gradients(model), expected)
    oracle.assert_close64(x.grad, dx, 1e-12)
    model.zero_grad()
    checkpoint_sequential(model, 3, x, use_reentrant=reentrant).square().sum().backward()
    assert_same(gradients(model), expected)


@REENTRANT
@pytest.mark.parametrize("frozen", [["0"], ["3"], ["0", "1"], ["5"], ["0", "1", "3", "5"]])
def test_checkpointed_with_wholly_frozen_layers(reentrant, frozen):
    model = neq.convert(net())
    for name in frozen:
        model.get_submodule(name).channels.set([])
    x = image()
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert_same(gradients(model), expected)
    for name in frozen:
        assert all(p.grad is None for p in model.get_submodule(name).parameters())


def test_checkpointed_prefix_without_anything_to_learn_stops():
    model = neq.convert(net())
    for name in ("0", "1", "3"):
        model.get_submodule(name).channels.set([])
    hidden = checkpoint(model[:5], image(requires_grad=False), use_reentrant=False)
    assert not hidden.requires_grad
    model[5](hidden).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["5.weight", "5.bias"]


@pytest.mark.parametrize("mask", [oracle.ragged, lambda k: [False] * k, lambda k: [True] * k])
def test_a_mask_changed_before_a_non_reentrant_backward_raises(mask):
    model = neq.convert(net())
    set_masks(model, oracle.half)
    loss = checkpoint(model, image(), use_reentrant=False).square().sum()
    set_masks(model, mask)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_mask_changed_before_a_reentrant_backward_is_the_mask_of_its_recomputation():
    """The only graph there is was recorded after the change."""
    model = neq.convert(net())
    x = image()
    set_masks(model, oracle.ragged)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    set_masks(model, oracle.half)
    loss = checkpoint(model, x, use_reentrant=True).square().sum()
    set_masks(model, oracle.ragged)
    loss.backward()
    assert_same(gradients(model), expected)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.scale


@REENTRANT
def test_followers_inside_a_checkpoint(reentrant):
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)).double(), others="follow")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for active in ([0, 2], []):
        model[0].linear.channels.set(active)
        model.zero_grad()
        model(x).square().sum().backward()
        expected = gradients(model)
        assert (expected[0] is None) == (not active)
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert_same(gradients(model), expected)
        assert isinstance(model[0].scale, nn.Parameter)


class Blocks(nn.Module):
    """A stem, two blocks under a checkpoint, and a head."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.reentrant, self.asks = reentrant, False

    def forward(self, x):
        x = self.stem(x)
        x = x.requires_grad_() if self.asks else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def learned(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@REENTRANT
@pytest.mark.parametrize("n_frozen", [0, 1, 2])
def test_active_blocks_above_a_frozen_stem(reentrant, n_frozen):
    """Reentrant, their gradients would be lost: an error says so, before anything is computed
    in vain, and the ways out that it names are ways out."""
    model, x = neq.convert(Blocks(reentrant)), torch.randn(3, 4)
    everything = learned(model, x)
    frozen = [model.stem, *(block[0] for block in model.blocks[:n_frozen])]
    for layer in frozen:
        layer.channels.set([])
    names = {name for name in everything if not name.startswith("stem")}
    for i in range(n_frozen):
        names = {name for name in names if not name.startswith(f"blocks.{i}")}
    if reentrant and n_frozen < 2:
        with pytest.raises(RuntimeError, match=r"use_reentrant=False.*requires_grad_\(\)"):
            model(x)
        with torch.no_grad():  # an evaluation, in training mode or not
            model(x)
        with pytest.raises(RuntimeError, match="would get no gradient"):
            model(x)
        model.asks = True
        assert learned(model, x) == names
        model.asks, model.reentrant = False, False
    assert learned(model, x) == names
    model.stem.channels.reset()
    assert learned(model, x) >= names | {"stem.weight"}


def test_a_reentrant_checkpoint_above_a_parameter_that_stopped():
    class Tabled(Blocks):
        def __init__(self):
            super().__init__(True)
            self.stem = nn.Embedding(5, 4)

    model = neq.convert(Tabled(), others="follow", filter=lambda name, _: name != "stem")
    ids = torch.tensor([1, 2])
    model(ids)
    model.blocks[0][0].channels.set([])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(ids)


@REENTRANT
def test_nested_checkpoints_with_a_live_input(reentrant):
    model = neq.convert(net())
    model[0].channels.set([])
    x = image()
    inner = lambda y: checkpoint(model[3:], y, use_reentrant=reentrant)  # noqa: E731
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    outer = checkpoint(lambda y: inner(model[:3](y)), x, use_reentrant=reentrant)
    outer.square().sum().backward()
    assert_same(gradients(model), expected)


@REENTRANT
def test_checkpointing_under_autocast(reentrant):
    model = neq.convert(net().float())
    set_masks(model, oracle.half)
    x = image().detach().float().requires_grad_()
    results = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=reentrant)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(x).square().sum()
        loss.backward()
        results.append(gradients(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
