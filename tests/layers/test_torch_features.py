"""Converted models in PyTorch's hands: copies, checkpoints, devices, functional calls, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle
from tests.support.layer_cases import frozen_net, net, through_a_file


def masks(model):
    return [layer.channels.mask.tolist() for _, layer in named_neuron_layers(model)]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("others", ["train", "follow"])
def test_copies_are_equal_and_independent(copied, others):
    model = frozen_net(others=others)
    twin = copied(model)
    assert masks(twin) == masks(model)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(twin(x), model(x))
    twin[0].channels.set([1])
    twin[4].channels.reset()
    assert masks(model) == masks(frozen_net())
    twin(x).sum().backward()
    oracle.assert_frozen_are_zero(twin[0].weight.grad, [False, True, False, False])
    assert all(p.grad is None for p in model.parameters())


def test_checkpoints_go_both_ways():
    plain, ours = net(), frozen_net()
    x = torch.randn(2, 3, 5, 5)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert ours.load_state_dict(plain.state_dict()) == plain.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    fresh = net().eval()
    assert str(fresh.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(ours(x), fresh(x))
    assert masks(ours) == masks(frozen_net()), "masks are no part of a checkpoint"


def test_channels_share_no_fate_with_dtype_and_device():
    model = frozen_net()
    order, generation = model[0].channels.order(), model[0].channels.generation
    model.double().half().to(torch.bfloat16).float()
    model.to("meta")
    model.to_empty(device="cpu")
    assert masks(model) == masks(frozen_net())
    assert model[0].channels.order() is order
    assert model[0].channels.generation == generation
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.eval()(torch.randn(2, 3, 5, 5)).sum()
    model[4].channels.reset()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    oracle.assert_frozen_are_zero(model[0].weight.grad, [True, False, False, True])


def meta_step(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def test_a_training_step_on_the_meta_device():
    """Shapes without data, as FLOP and memory estimators use them. Active rows are counted."""
    with torch.device("meta"):
        plain, ours = net(), neq.convert(net())
        x = torch.randn(2, 3, 5, 5)
    dense = meta_step(plain, x)
    assert meta_step(ours, x) == dense
    ours[0].channels.set([0, 3])
    ours.zero_grad()
    half_of_the_wgrad = 2 * (2 * 9) * 2 * (3 * 9)
    assert meta_step(ours, x) == dense - half_of_the_wgrad
    assert all(p.grad.shape == p.shape for p in ours.parameters())


def test_a_training_step_on_fake_tensors():
    with FakeTensorMode():
        model = neq.convert(net())
        model(torch.randn(2, 3, 5, 5)).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_parameters_may_be_replaced():
    layer = neq.convert(nn.Linear(3, 4))
    layer.channels.set([0, 2])
    layer.weight = nn.Parameter(torch.randn(4, 3))
    layer(torch.ones(2, 3)).sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [True, False, True, False])
    assert [p for p, _ in layer.neuron_parameters()] == [layer.weight, layer.bias]


def test_functional_call_masks_the_tensors_it_is_given():
    model = frozen_net()
    model[4].channels.reset()
    replaced = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, replaced, torch.randn(2, 3, 5, 5)).sum().backward()
    oracle.assert_frozen_are_zero(replaced["0.weight"].grad, [True, False, False, True])
    assert bool(replaced["0.weight"].grad[0].ne(0).any())
    assert all(p.grad is None for p in model.parameters())


def test_functorch_over_a_converted_model():
    plain, ours = net().eval(), neq.convert(net()).eval()
    ours.load_state_dict(plain.state_dict())
    ours[0].channels.set([0, 3])
    x = torch.randn(4, 3, 5, 5)

    def per_sample(model):
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    got, dense = per_sample(ours), per_sample(plain)
    for name in ("0.weight", "0.bias"):
        dense[name][:, [1, 2]] = 0
    for name, expected in dense.items():
        assert torch.equal(got[name], expected)


@pytest.mark.parametrize("mask", [lambda k: [True] * k, oracle.half])
def test_a_model_under_autocast(mask):
    plain = net()
    ours = neq.convert(copy.deepcopy(plain))
    for _, layer in named_neuron_layers(ours):
        layer.channels.set(mask(len(layer.channels)))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(8, 3, 5, 5)
    exact(x.double()).square().sum().backward()
    outs = []
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            out.float().square().sum().backward()
        outs.append(out)
    assert outs[1].dtype == torch.bfloat16
    assert torch.equal(*outs)
    owners = neuron_owners(ours)
    for parameter, low, true in zip(
        ours.parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        ((channels, _),) = owners[parameter]
        frozen = channels.mask.tolist()
        assert parameter.grad.dtype == torch.float32
        oracle.assert_frozen_are_zero(parameter.grad, frozen)
        oracle.assert_within_dtype_rule(
            parameter.grad.bfloat16(),
            oracle.zero_frozen(low.grad, frozen).bfloat16(),
            oracle.zero_frozen(true.grad, frozen),
        )
