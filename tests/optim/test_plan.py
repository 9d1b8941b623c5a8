"""A step is planned once, and planned anew after every change: the runs that follow are those of a
twin that plans every step."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam

from neq_kernels.optim import attach, row_steps
from tests.support.backends import cpu
from tests.support.optimizer_nets import layers, make_net

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD dampening": lambda ps: SGD(ps, lr=0.05, momentum=0.9, dampening=0.3),
    "Adam": lambda ps: Adam(ps, lr=0.05, amsgrad=True),
}


@pytest.fixture(params=MAKE, name="make")
def make_fixture(request):
    return MAKE[request.param]


def set_masks(net, keep=2):
    for layer in layers(net).values():
        layer.channels.set([k for k in range(len(layer.channels)) if k % keep == 0])


class Twins:
    def __init__(self, make, frozen_state="reset"):
        self.nets = [make_net(), make_net()]
        self.optimizers = [make(net.parameters()) for net in self.nets]
        self.handles = [
            attach(optimizer, net, frozen_state)
            for optimizer, net in zip(self.optimizers, self.nets, strict=True)
        ]
        self.seed = 0

    def each(self, change):
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            change(net, optimizer)

    def steps(self, n, grads=lambda net: None):
        for _ in range(n):
            self.seed += 1
            for net in self.nets:
                generator = torch.Generator().manual_seed(self.seed)
                for p in net.parameters():
                    grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.grad = torch.empty_like(p).copy_(grad)
                grads(net)
            self.handles[1]._plan = None
            self.each(lambda net, optimizer: optimizer.step())
        ours, planned = self.nets
        assert all(map(torch.equal, ours.parameters(), planned.parameters()))
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def no_gradient(net):
    net.conv.weight.grad = None


def transposed_gradient(net):
    net.linear.weight.grad = net.linear.weight.grad.t().contiguous().t()


def sparse_gradient(net):
    net.linear.weight.grad = net.linear.weight.grad.to_sparse()


def replaced_state(net, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def cleared_state(net, optimizer):
    optimizer.state.clear()


def state_in_other_strides(net, optimizer):
    state = optimizer.state[net.linear.weight]
    for key, value in state.items():
        if value.dim() == 2:
            state[key] = value.t().contiguous().t()


def other_dtype(net, optimizer):
    """As ``.to`` does with the parameters and loading with the state."""
    net.float()
    optimizer.load_state_dict(optimizer.state_dict())


def other_strides(net, optimizer):
    net.to(memory_format=torch.channels_last)
    optimizer.load_state_dict(optimizer.state_dict())
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == p.shape and value.dtype == p.dtype:
                state[key] = torch.empty_like(p).copy_(value)


def split_group(net, optimizer):
    params = optimizer.param_groups[0]["params"]
    last = params.pop()
    optimizer.add_param_group({"params": [last], "lr": 0.5})


def other_masks(net, optimizer):
    set_masks(net, keep=3)


def all_active(net, optimizer):
    for layer in layers(net).values():
        layer.channels.reset()


def setting(key, value):
    def change(net, optimizer):
        for group in optimizer.param_groups:
            if key in group:
                group[key] = value

    change.__name__ = f"{key}={value}"
    return change


CHANGES = [
    replaced_state,
    cleared_state,
    state_in_other_strides,
    other_dtype,
    other_strides,
    split_group,
    other_masks,
    all_active,
    setting("lr", 0.01),
    setting("lr", torch.tensor(0.02)),
    setting("maximize", True),
    setting("momentum", 0.5),
    setting("momentum", 0.0),
    setting("dampening", 0.4),
    setting("amsgrad", False),
    setting("differentiable", False),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("frozen_state", ["reset", "keep", "reference"])
def test_every_change_is_noticed(make, change, frozen_state):
    twins = Twins(make, frozen_state)
    twins.steps(1)
    twins.each(lambda net, optimizer: set_masks(net))
    twins.steps(3)
    twins.each(change)
    twins.steps(3)


@pytest.mark.parametrize("grads", [no_gradient, transposed_gradient, sparse_gradient])
@pytest.mark.parametrize("optimizer", ["SGD", "SGD dampening"])
def test_gradients_of_another_kind_are_noticed(optimizer, grads):
    twins = Twins(MAKE[optimizer])
    twins.each(lambda net, optimizer: set_masks(net))
    twins.steps(2)
    for _ in range(2):
        if grads is sparse_gradient:  # torch's own step takes it without these only
            twins.each(setting("momentum", 0.0))
            twins.each(setting("weight_decay", 0.0))
        twins.steps(2, grads)
        twins.steps(2)


def test_active_neurons_that_catch_up_with_the_count_of_all():
    twins = Twins(MAKE["Adam"], "keep")
    twins.each(lambda net, optimizer: net.linear.channels.set([0]))
    twins.steps(3)
    twins.each(lambda net, optimizer: net.linear.channels.set([1]))
    twins.steps(5)
    assert twins.optimizers[0].state[twins.nets[0].linear.weight]["step"] == 5


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the extension is not built")
def test_one_call_for_a_group_and_no_new_plan_without_a_change(monkeypatch, make):
    net = make_net()
    optimizer = make(net.parameters())
    attach(optimizer, net)
    set_masks(net)
    calls, plans = [], []
    for name in ("sgd_rows_", "adam_rows_"):
        right = getattr(cpu, name)

        def counted(params, *lists, right=right, **flags):
            calls.append(len(params))
            right(params, *lists, **flags)

        monkeypatch.setattr(cpu, name, counted)
    plan = row_steps.RowSteps.plan
    monkeypatch.setattr(
        row_steps.RowSteps, "plan", lambda self, *args: plans.append(0) or plan(self, *args)
    )
    for _ in range(5):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
    assert calls == [len(list(net.parameters())) - 1] * 5
    assert len(plans) <= 2
