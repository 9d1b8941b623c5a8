"""An optimizer of which nothing learns still gets one gradient: GradScaler.step wants it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import neq_kernels as neq
from neq_kernels.optim import is_attached


def chain():
    torch.manual_seed(0)
    return neq.convert(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)))


def train(model, optimizers, n_steps=2):
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(n_steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("make", [SGD, Adam, RMSprop])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_scaler_steps_a_wholly_frozen_optimizer(make, frozen):
    model = chain()
    optimizers = [make(layer.parameters(), lr=0.1) for layer in model]
    for optimizer in optimizers:
        neq.attach(optimizer, model)
    model[frozen].channels.set([])
    before = copy.deepcopy(list(model.parameters()))
    train(model, optimizers)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [i // 2 != frozen for i in range(6)]
    assert model[frozen].weight.grad is None
    assert bool((model[frozen].bias.grad == 0).all())
    model[frozen].channels.reset()
    train(model, optimizers)
    assert not torch.equal(model[frozen].weight, before[2 * frozen])


def test_the_smallest_parameter_stands_in_wherever_the_first_layer_runs():
    model = chain()
    optimizers = [SGD([*model[1].parameters(), *model[0].parameters()], lr=0.1)]
    optimizers.append(SGD(model[2].parameters(), lr=0.1))
    for optimizer in optimizers:
        neq.attach(optimizer, model)
    model[0].channels.set([])
    model(torch.randn(3, 4)).sum().backward()
    assert model[0].bias.grad is None  # model[1] learns, and its optimizer has gradients
    model.zero_grad()
    model[1].channels.set([])
    model(torch.randn(3, 4)).sum().backward()
    grads = [p.grad is not None for p in model.parameters()]
    assert grads == [False, False, False, True, True, True]


def test_without_a_live_output_nothing_can_stand_in():
    """As documented: the frozen tower runs last, so no output that needs a gradient follows it."""
    model = neq.convert(nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    optimizers = [SGD(tower.parameters(), lr=0.1) for tower in model]
    for optimizer in optimizers:
        neq.attach(optimizer, model)
    model[1].channels.set([])
    scaler, x = torch.amp.GradScaler("cpu"), torch.ones(3, 4)
    scaler.scale((model[0](x) * model[1](x)).sum()).backward()
    scaler.step(optimizers[0])
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizers[1])


def test_an_optimizer_with_a_parameter_that_no_neuron_owns_needs_no_stand_in():
    model = chain()
    scale = nn.Parameter(torch.ones(()))
    optimizer = SGD([*model[0].parameters(), scale], lr=0.1)
    neq.attach(optimizer, model)
    model[0].channels.set([])
    (model(torch.randn(3, 4)) * scale).sum().backward()
    assert model[0].bias.grad is None
    scale.requires_grad_(False)
    (model(torch.randn(3, 4)) * scale).sum().backward()
    assert bool((model[0].bias.grad == 0).all())


def test_a_removed_or_forgotten_optimizer_asks_for_nothing():
    model = chain()
    for forget in (lambda handle, optimizer: handle.remove(), lambda handle, optimizer: None):
        optimizer = SGD(model[0].parameters(), lr=0.1)
        handle = neq.attach(optimizer, model)
        assert is_attached(model)
        assert not is_attached(copy.deepcopy(model))
        forget(handle, optimizer)
        handle.report()
        del handle, optimizer
        gc.collect()
        assert not is_attached(model)
        model[0].channels.set([])
        model.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        assert model[0].bias.grad is None


def test_layers_converted_later_know_the_optimizer():
    model = nn.Sequential(neq.nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    neq.attach(optimizer, model)
    optimizer.step()
    neq.convert(model)
    optimizer.step()
    assert all(optimizer in [a._optimizer for a in layer.anchor.optimizers] for layer in model)


def test_a_constructed_layer_on_its_own_is_no_obstacle():
    layer = neq.nn.Linear(4, 5)
    optimizer = SGD(layer.parameters(), lr=0.1)
    neq.attach(optimizer, layer)
    layer.channels.set([])
    x = torch.ones(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert bool((layer.bias.grad == 0).all())
