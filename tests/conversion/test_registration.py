"""neq.register: neurons for layers of the user's own classes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import neq_kernels as neq
from neq_kernels.channels import NeuronLayout
from neq_kernels.conversion.neuron_classes import NEURON_CLASSES
from neq_kernels.layers.base import NeuronLayer
from tests.support.models import entries


@neq.register
class Cosine(nn.Linear):
    """A linear layer over unit vectors."""

    def forward(self, input):
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Stack(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4))  # [in, out]
        self.shift = nn.Parameter(torch.randn(4)) if bias else None

    def forward(self, x):
        out = x @ self.matrix
        return (out if self.shift is None else out + self.shift).movedim(-1, 0)


neq.register(Stack, weight="matrix", bias="shift", axis=1, channel_dim=0)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: Cosine(3, 4), (5, 3)), (Stack, (5, 3)), (lambda: Stack(False), (2, 3))],
)
@pytest.mark.parametrize("active", [[0, 1, 2, 3], [1, 2], []])
def test_gradients_are_the_dense_ones_of_active_neurons(make, shape, active):
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain))
    assert isinstance(ours, NeuronLayer)
    ours.channels.set(active)
    x = torch.randn(shape, dtype=torch.float64)
    outs = []
    for layer in (plain, ours):
        t = x.clone().requires_grad_()
        out = layer(t)
        out.square().sum().backward()
        outs += [out, t.grad]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    mask = ours.channels.mask
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        layout = ours.layout if p.dim() == 2 else NeuronLayout()
        if not active:
            assert q.grad is None
            continue
        expected = p.grad.clone()
        layout.fill_(expected, (~mask).nonzero().flatten(), 0)
        assert torch.equal(q.grad, expected)
    assert ours.channel_dim(outs[2]) == (1 if isinstance(plain, Cosine) else 0)
    assert type(neq.revert(ours)) is type(plain)


def test_training_and_copies():
    layer = neq.convert(Cosine(3, 4))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    neq.attach(optimizer, layer)
    layer.channels.set([2])
    before = layer.weight.detach().clone()
    layer(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert (layer.weight != before).any(1).tolist() == [False, False, True, False]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.channels.n_active == 1


def test_the_exact_class_alone():
    class Further(Cosine):
        pass

    model = neq.convert(nn.Sequential(Further(3, 4), nn.Linear(4, 4)))
    assert type(model[0]) is Further
    assert "its own forward; see neq.register" in entries(model)["0"].reason


def test_the_same_twice_is_fine():
    assert neq.register(Stack, weight="matrix", bias="shift", axis=1, channel_dim=0) is Stack
    neq.convert(Cosine(3, 4))
    assert neq.register(Cosine) is Cosine


class Plain(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: neq.register(3), TypeError, "cls: expected a subclass of torch.nn.Module, got 3"),
        (lambda: neq.register(int), TypeError, "cls: expected a subclass"),
        (lambda: neq.register(nn.Linear), ValueError, "class of your own, got torch.*Linear"),
        (lambda: neq.register(nn.LSTM), ValueError, "class of your own"),
        (lambda: neq.register(neq.nn.Linear), ValueError, "class of your own"),
        (lambda: neq.register(Plain), ValueError, "convert does not know, got Plain"),
        (lambda: neq.register(Cosine, axis=1), ValueError, "Cosine to be registered once"),
        (lambda: neq.register(Unknown, axis=-1), ValueError, "got axis=-1, groups=1"),
        (lambda: neq.register(Unknown, groups=2), ValueError, "got axis=0, groups=2"),
        (lambda: neq.register(Unknown, weight=None), TypeError, "weight: expected"),
        (lambda: neq.register(Unknown, channel_dim="last"), TypeError, "channel_dim: expected"),
    ],
)
def test_bad_calls_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert Unknown not in NEURON_CLASSES


def test_a_layer_that_does_not_fit_is_left_alone_and_says_why():
    stack = Stack()
    stack.shift = nn.Parameter(torch.ones(3))
    model = neq.convert(nn.Sequential(stack, nn.Linear(4, 4)))
    reason = entries(model)["0"].reason
    assert reason == "its parameters hold different numbers of neurons: {'matrix': 4, 'shift': 3}"


@pytest.mark.parametrize("renamed", [False, True])
def test_a_layer_with_a_checkpoint_inside_its_forward_is_left_alone(renamed):
    """The recomputation would read the parameters themselves, frozen neurons' too."""

    class ByName(Stack):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    class Renamed(Stack):
        def forward(self, x):
            return recomputed(super().forward, x, use_reentrant=False)

    kind = Renamed if renamed else ByName
    neq.register(kind, weight="matrix", bias="shift", axis=1, channel_dim=0)
    model = neq.convert(nn.Sequential(nn.Linear(3, 3), kind()))
    assert "has a checkpoint inside" in entries(model)["1"].reason
    assert type(model[1]) is kind
