"""A weight that learns without its layer being called is found in the first backward, named once,
and nothing else is ever accused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

import neq_kernels as neq
from tests.support.models import Bypassing


@pytest.fixture
def told():
    """The warnings of a test."""
    torch._dynamo.utils.counters.clear()  # other tests may have compiled
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if "not called" in str(w.message)]


@pytest.mark.parametrize("active", [range(4), [1], []], ids=["all", "one", "none"])
def test_the_first_backward_names_a_bypassed_layer_once(told, active):
    model = neq.convert(Bypassing())
    for layer in (model.called, model.bypassed):
        layer.channels.set(active)
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    assert told() == []
    for _ in range(2):
        model(x).sum().backward()
    (message,) = told()
    assert message.startswith("bypassed: the weight got a gradient though the layer was not called")
    assert not any(p._backward_hooks for p in model.parameters() if p.grad is not None)


def test_many_are_told_in_one_warning(told):
    model = neq.convert(nn.Sequential(*(Bypassing() for _ in range(7))))
    model(torch.randn(3, 4)).sum().backward()
    (message,) = told()
    assert message.startswith("6.bypassed, 5.bypassed, 4.bypassed, 3.bypassed, 2.bypassed and 2 ")


class Read(Bypassing):
    def forward(self, x):
        x = F.linear(self.called(x), self.bypassed.weight, self.bypassed.bias)
        return x @ self.called.weight + self.bypassed.bias.exp()


@pytest.mark.parametrize("active", [range(4), [1], []], ids=["all", "one", "none"])
def test_weights_that_the_source_shows_to_be_read_are_not_accused(told, active):
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), Read()))
    for layer in (model[1].called, model[1].bypassed):
        layer.channels.set(active)
    model(torch.randn(3, 4)).sum().backward()
    assert told() == []


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}], ids=str)
def test_attention_is_not_accused(told, options):
    attention = neq.convert(nn.MultiheadAttention(4, 2, **options))
    key, value = (torch.randn(3, 2, options.get(n, 4)) for n in ("kdim", "vdim"))
    attention(torch.randn(3, 2, 4), key, value)[0].sum().backward()
    assert told() == []


def test_a_gradient_that_is_zero_at_first_is_looked_at_again(told):
    model = neq.convert(nn.Sequential(Bypassing(), nn.Linear(4, 4)))
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for expected in (0, 1):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert len(told()) == expected


def test_autograd_grad_is_a_backward_too(told):
    model = neq.convert(Bypassing())
    torch.autograd.grad(model(torch.randn(3, 4)).sum(), list(model.parameters()))
    assert len(told()) == 1


def test_a_layer_that_is_never_used_may_learn_zeros(told):
    """What some scripts do to keep data-parallel reducers content."""
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for _ in range(12):
        (model[0](torch.randn(3, 4)).sum() + 0 * model[1].weight.sum()).backward()
    assert told() == []
    assert not model[1].weight._backward_hooks


class Every(nn.Module):
    """Layers of many kinds, all called, some of them twice or under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.body[2].weight = self.body[1].weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.read, self.scaled = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        x = self.up(self.stem(x)).flatten(2).mT
        x = self.attention(x, x, x.relu())[0]
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        x = nn.functional.linear(x, self.scaled.weight * 2)
        return self.bilinear(self.body(x).float(), self.body(x).float())


def plain(model, x):
    return model(x)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()


def checkpointed(model, x):
    return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def mapped(model, x):
    return torch.func.vmap(model, randomness="same")(x.unsqueeze(0))


def compiled(model, x):
    return torch.compile(model, backend="eager")(x)


@pytest.mark.parametrize("call", [plain, autocast, checkpointed, mapped, compiled])
@pytest.mark.parametrize("active", ["all", "half", "none"])
def test_layers_that_are_called_are_not_accused(told, call, active):
    model = neq.convert(Every()).eval()
    for layer in model.modules():
        if hasattr(layer, "channels"):
            n = len(layer.channels)
            layer.channels.set(range({"all": n, "half": n // 2, "none": 0}[active]))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    call(model, x).sum().backward()
    assert told() == []
    if call is not compiled:  # which leaves no trace of a call: some more gradients are looked at
        learning = [p for p in model.parameters() if p.grad is not None]
        assert bool(learning) == (active != "none")
        assert not any(p._backward_hooks for p in learning)


def test_functions_of_ours_are_calls(told):
    layer = neq.convert(nn.Linear(4, 4))
    neq.functional.linear(
        torch.randn(3, 4), layer.weight, layer.bias, layer.channels
    ).sum().backward()
    assert told() == []


def test_a_bypass_in_compiled_code_shows_where_neurons_are_frozen(told):
    torch.compiler.reset()
    model = neq.convert(Bypassing())
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(20):
        step(torch.randn(3, 4)).sum().backward()
    assert told() == []
    model.bypassed.channels.set([0])
    step(torch.randn(3, 4)).sum().backward()
    assert len(told()) == 1


def test_copies_and_pickles_carry_no_hooks(told):
    model = neq.convert(Bypassing())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(p._backward_hooks for p in other.parameters())
        other(torch.randn(3, 4)).sum().backward()
    assert told() == []


def test_other_hooks_stay_and_revert_takes_ours(told):
    model = nn.Sequential(Bypassing())
    seen = []
    model[0].bypassed.weight.register_hook(seen.append)
    neq.convert(neq.convert(model))
    assert len(model[0].bypassed.weight._backward_hooks) == 2
    neq.revert(model)
    model(torch.randn(3, 4)).sum().backward()
    assert len(seen) == 1
    assert told() == []


def test_parameters_swapped_by_functional_call_are_no_bypass(told):
    model = neq.convert(Bypassing())
    values = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, values, (torch.randn(3, 4),)).sum().backward()
    assert told() == []
    assert values["bypassed.weight"].grad is not None
