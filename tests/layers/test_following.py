"""Parameters that follow the layers of their block (others="follow")."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import following_parameters, neuron_owners
from tests.support import oracle
from tests.support.models import (
    Scaled,
    converted,
    freeze,
    output_of,
    set_ragged,
    tiny_convnext,
    tiny_swin,
    tiny_vit,
)


class Block(nn.Module):
    """Attention whose every parameter follows the linear layer beside it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.attention(x, key=x, value=x, need_weights=False)[0])


def frozen_blocks():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3)).double()
    ours = neq.convert(copy.deepcopy(plain), others="follow")
    freeze(ours, but=["2"])
    plain[1].requires_grad_(False)
    return plain, ours


def test_frozen_attention_that_no_gradient_reaches_runs_in_no_grad():
    _, ours = frozen_blocks()
    seen = []
    ours[1].attention.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with oracle.CalledOps() as called:
        out = ours(torch.randn(2, 5, 8, dtype=torch.float64))
    assert torch.is_grad_enabled()
    assert seen == [False]
    assert "bmm" not in called.names  # PyTorch's way to project a batch-first input
    out.sum().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]


def test_frozen_attention_hands_a_gradient_down():
    plain, ours = frozen_blocks()
    ours[0].channels.reset()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for expected, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            oracle.assert_close64(parameter.grad, expected.grad, 1e-9)


def test_frozen_attention_that_raises_leaves_grad_mode_on():
    _, ours = frozen_blocks()
    with pytest.raises((RuntimeError, AssertionError)):
        ours[1](torch.randn(2, 5, 7, dtype=torch.float64))
    assert torch.is_grad_enabled()
    ours[1].linear.channels.reset()
    ours(torch.randn(2, 5, 8, dtype=torch.float64)).sum().backward()
    assert ours[1].attention.in_proj_weight.grad is not None


def test_followers_stop_and_start_with_their_block():
    model = neq.convert(nn.Sequential(Scaled(), Scaled(), nn.Linear(4, 2)), others="follow")
    x = torch.randn(3, 4)

    def learned():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    everything = {name for name, _ in model.named_parameters()}
    assert learned() == everything
    model[0].linear.channels.set([])
    assert learned() == everything - {"0.linear.weight", "0.linear.bias", "0.scale"}
    model[0].linear.channels.set([2])
    assert learned() == everything
    freeze(model, but=["2"])
    assert learned() == {"2.weight", "2.bias"}


def test_a_forward_that_raises_leaves_parameters_in_place():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    scale = model[0].scale
    model[0].linear.channels.set([])
    with pytest.raises(ArithmeticError):
        model(torch.randn(3, 5))
    assert model[0].scale is scale
    assert dict(model.named_parameters())["0.scale"] is scale
    model[0].linear.channels.reset()
    model(torch.randn(3, 4)).sum().backward()
    assert scale.grad is not None


def test_parameters_are_themselves_after_every_forward():
    model = neq.convert(tiny_vit(), others="follow").train()
    before = dict(model.named_parameters())
    freeze(model)
    model(torch.randn(2, 3, 16, 16))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(tiny_vit().state_dict())


@pytest.mark.parametrize(
    ("make", "size", "head", "lowest"),
    [
        (tiny_vit, 16, "heads.head", "heads.head"),
        (tiny_swin, 32, "head", "head"),
        (tiny_convnext, 32, "classifier.2", "classifier.2"),
    ],
)
def test_everything_frozen_but_the_head_stops_backprop_there(make, size, head, lowest):
    model = neq.convert(make(), others="follow")
    assert head in converted(model)
    freeze(model, but=[head])
    seen = []
    model.get_submodule(lowest).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].requires_grad)
    )
    model(torch.randn(2, 3, size, size)).sum().backward()
    assert seen == [False]
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {f"{layer}.{p}" for layer in (head, lowest) for p in ("weight", "bias")}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_follow_their_own_block(copied):
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    twin = copied(model)
    twin[0].linear.channels.set([])
    x = torch.randn(3, 4)
    for each in (model, twin):
        each(x).sum().backward()
    assert twin[0].scale.grad is None
    assert model[0].scale.grad is not None
    assert [f.parameters for f in following_parameters(twin)] == [[twin[0].scale]]
    neq.revert(twin)
    model[0].linear.channels.set([])
    model.zero_grad()
    model(x).sum().backward()
    assert model[0].scale.grad is None


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext, tiny_swin])
def test_followers_compute_what_they_did(make):
    size = 16 if make is tiny_vit else 32
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain), others="follow")
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert torch.equal(output_of(ours, x), output_of(plain, x))
    set_ragged(ours)
    outs = [output_of(model, x) for model in (plain, ours)]
    for out in outs:
        out.square().sum().backward()
    owners = neuron_owners(ours)
    for parameter, dense in zip(ours.parameters(), plain.parameters(), strict=True):
        exact = dense.grad.clone()
        for channels, layout in owners.get(parameter, ()):
            layout.fill_(exact, channels.frozen, 0)
        oracle.assert_close64(parameter.grad, exact, 1e-9)
    freeze(ours)
    assert torch.equal(output_of(ours.eval(), x), output_of(plain.eval(), x))


def test_nested_blocks_and_reused_blocks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.gain = Scaled(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.block(self.block(x)) * self.gain

    model = neq.convert(nn.Sequential(Twice(), nn.Linear(4, 2)), others="follow")
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model[0].block.linear.channels.set([])
    model(x).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]


def test_a_mode_without_gradients_moves_nothing_aside():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    freeze(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)
    assert isinstance(model[0].scale, nn.Parameter)
