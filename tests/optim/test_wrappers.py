"""Optimizers inside wrappers of trainers."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.optim import SGD

import neq_kernels as neq


def small():
    torch.manual_seed(0)
    return neq.convert(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)))


@pytest.mark.parametrize("attach_first", [True, False])
def test_an_accelerated_optimizer_is_the_one_inside(attach_first):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    if attach_first:
        handle = neq.attach(optimizer, model)
    accelerator = Accelerator(cpu=True)
    wrapped, accelerated = accelerator.prepare(model, optimizer)
    if not attach_first:
        handle = neq.attach(accelerated, wrapped)
    assert {update.update for update in handle.report()} == {"rows"}
    model[0].channels.set([1, 2])
    before = model[0].weight.detach().clone()
    accelerator.backward(wrapped(torch.ones(3, 4)).square().sum())
    accelerated.step()
    assert (model[0].weight.detach() != before).any(1).nonzero().flatten().tolist() == [1, 2]
    with pytest.raises(ValueError, match="call remove"):
        neq.attach(accelerated, model)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lightning.fabric.wrappers", "_FabricOptimizer"),
        ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
    ],
)
def test_wrappers_of_lightning_are_seen_through(monkeypatch, module, name):
    class Wrapper:
        def __init__(self, optimizer):
            self._optimizer = optimizer

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: Wrapper}))
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    neq.attach(Wrapper(Wrapper(optimizer)), model)
    assert optimizer._optimizer_step_pre_hooks


def test_a_wrapper_that_runs_no_hooks_is_refused():
    model = small()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"runs step hooks, got Lookahead.*attach the"):
        neq.attach(optimizer, model)


def test_a_wrapper_that_is_no_optimizer_is_refused():
    model = small()
    optimizer = types.SimpleNamespace(optimizer=SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got SimpleNamespace"):
        neq.attach(optimizer, model)
