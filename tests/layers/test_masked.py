"""Masked layers: the stock forward, on parameters whose frozen neurons are constants."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import neq_kernels as neq
from neq_kernels.channels import NeuronLayout
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.masked import FurtherNeurons, Masked, Owned
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners


class Experts(nn.Module):
    """Two stacks of matrices, as in a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.up_bias = nn.Parameter(torch.randn(3, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))  # [expert, in, out]

    def forward(self, x, fails=False):
        if fails:
            raise ArithmeticError("on purpose")
        hidden = torch.einsum("bi,eoi->beo", x, self.up) + self.up_bias
        return {"out": torch.einsum("beo,eoi->bi", hidden.tanh(), self.down), "n": 3}


class MaskedExperts(Masked, Experts):
    owned = (Owned("up", axis=1, groups=None), Owned("up_bias", axis=1, groups=None))
    further = ((Owned("down", axis=2, groups=None),),)
    output_dim = None


def experts():
    torch.manual_seed(0)
    plain = Experts().double()
    ours = copy.deepcopy(plain)
    ours.__class__ = MaskedExperts
    template = neq.nn.Linear(2, 2)
    ours.adopt(neq.ActiveChannels(15), "exact", template.anchor)
    return plain, ours, torch.randn(6, 4, dtype=torch.float64)


def grads(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x)["out"].square().sum().backward()
    return [x.grad, *(p.grad for p in (model.up, model.up_bias, model.down))]


def test_two_sets_of_neurons_of_experts():
    plain, ours, x = experts()
    assert isinstance(ours.down_neurons, FurtherNeurons)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [len(layer.channels) for _, layer in named_neuron_layers(ours)] == [15, 12]
    ours.channels.set([0, 6, 14])  # (expert, feature): (0, 0), (1, 1), (2, 4)
    ours.down_neurons.channels.set([3, 4])  # (0, 3), (1, 0)
    up, down = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    for e, f in ((0, 0), (1, 1), (2, 4)):
        up[e, f] = True
    for e, f in ((0, 3), (1, 0)):
        down[e, f] = True
    expected = grads(plain, x)
    expected[1] = expected[1] * up[:, :, None]
    expected[2] = expected[2] * up
    expected[3] = expected[3] * down[:, None, :]
    for ours_, dense in zip(grads(ours, x), expected, strict=True):
        assert torch.equal(ours_, dense)
    assert torch.equal(ours(x)["out"], plain(x)["out"])
    owners = neuron_owners(ours)
    assert owners[ours.up] == [(ours.channels, NeuronLayout(3, axis=1))]
    assert owners[ours.down] == [(ours.down_neurons.channels, NeuronLayout(3, axis=2))]
    for parameter, ((channels, layout),) in owners.items():
        assert bool((layout.gather(parameter.grad, channels.frozen) == 0).all())
        assert bool((layout.gather(parameter.grad, channels.active) != 0).all())


def test_wholly_frozen_sets_ask_for_no_gradient():
    _, ours, x = experts()
    ours.down_neurons.channels.set([])
    ours(x)["out"].sum().backward()
    assert ours.down.grad is None
    assert ours.up.grad is not None
    ours.channels.set([])
    assert not ours(x)["out"].requires_grad


def test_the_parameters_are_back_after_an_error_and_after_each_forward():
    _, ours, x = experts()
    ours.channels.set([1])
    own = dict(ours._parameters)
    ours(x)
    with pytest.raises(ArithmeticError):
        ours(x, fails=True)
    assert all(ours._parameters[name] is p for name, p in own.items())


@pytest.mark.parametrize("active", [range(15), [1, 7]])
def test_a_change_before_backward_is_an_error(active):
    _, ours, x = experts()
    ours.channels.set(active)
    out = ours(x)["out"].sum()
    ours.channels.set([2])
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        out.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    _, ours, x = experts()
    ours.channels.set([1, 7])
    expected = grads(ours, x)
    ours.zero_grad()
    x = x.clone().requires_grad_()
    checkpoint(lambda t: ours(t)["out"], x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(ours.up.grad, expected[1])
    assert torch.equal(ours.down.grad, expected[3])


def test_second_derivatives_are_those_with_frozen_rows_constant():
    torch.manual_seed(0)
    plain = nn.Bilinear(3, 3, 4).double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.channels.set([0, 2])
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)

    def penalty(layer):
        parameters = tuple(layer.parameters())
        loss = layer(x, y).square().square().sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(first[0][[0, 2]].square().sum(), parameters)

    for mine, dense in zip(penalty(ours), penalty(plain), strict=True):
        assert torch.equal(mine[[0, 2]], dense[[0, 2]])
        assert bool((mine[[1, 3]] == 0).all())


@pytest.mark.parametrize("specialized", [False, True])
def test_compiled(specialized):
    torch._dynamo.reset()
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, affine=True)))
    neq.specialize(model, specialized)
    x = torch.randn(2, 4, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for active in ([0, 1, 2, 3], [1, 2], []):
        model[1].channels.set(active)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            results.append([p.grad for p in model.parameters()])
        for eager, traced in zip(*results, strict=True):
            if eager is None and not specialized:  # one graph serves all masks
                assert bool((traced == 0).all())
            elif eager is None:
                assert traced is None
            else:
                torch.testing.assert_close(traced, eager)
    torch._dynamo.reset()


def test_data_parallel_replicas():
    model = neq.convert(nn.Bilinear(3, 3, 4))
    model.channels.set([1])
    replica = model._replicate_for_data_parallel()
    for name, parameter in model.named_parameters():
        setattr(replica, name, parameter * 1)
    replica(torch.randn(2, 3), torch.randn(2, 3)).sum().backward()
    assert model.weight.grad.flatten(1).ne(0).any(1).tolist() == [False, True, False, False]


def test_functional_call():
    model = neq.convert(nn.InstanceNorm1d(4, affine=True))
    model.channels.set([1])
    weight = torch.ones(4, requires_grad=True)
    torch.func.functional_call(
        model, {"weight": weight}, torch.randn(2, 4, 5)
    ).square().sum().backward()
    assert weight.grad.ne(0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_further_neurons_belong_to_the_copy(copied):
    _, ours, x = experts()
    ours.down_neurons.channels.set([2])
    twin = copied(ours)
    assert isinstance(twin, NeuronLayer)
    assert twin.down_neurons.neuron_parameters()[0][0] is twin.down
    assert twin.down_neurons.channels.mask.tolist() == ours.down_neurons.channels.mask.tolist()
    assert all(torch.equal(a, b) for a, b in zip(grads(twin, x), grads(ours, x), strict=True))
