"""State of wholly frozen parameters that is freed, and is there again when it is needed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import neq_kernels as neq

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda ps: SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "SGD dampening": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.1),
}


@pytest.fixture(params=MAKE, name="make")
def make_fixture(request):
    return MAKE[request.param]


def net_of_two():
    torch.manual_seed(0)
    return neq.convert(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).double()


def step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def test_training_is_the_same_and_the_bytes_are_free(make):
    runs = []
    for frees in (False, True):
        net = net_of_two()
        optimizer = make(net.parameters())
        handle = neq.attach(optimizer, net, free_frozen_state=frees)
        history = []
        for seed, active in enumerate([[0, 1, 2, 3, 4, 5], [1, 2], [], [], [0, 2], [], range(6)]):
            net[0].channels.set(active)
            step(net, optimizer, seed)
            history.append([p.detach().clone() for p in net.parameters()])
            held = {p for p in net[0].parameters() if optimizer.state.get(p)}
            assert bool(held) is not (frees and not len(active))
            assert (handle.freed_state_bytes > 0) is (frees and not len(active))
        runs.append(history)
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


def test_the_bytes_are_those_of_the_states_tensors():
    net = net_of_two()
    optimizer = Adam(net.parameters())
    handle = neq.attach(optimizer, net, free_frozen_state=True)
    step(net, optimizer, 0)
    assert handle.freed_state_bytes == 0
    net[0].channels.set([])
    step(net, optimizer, 1)
    assert handle.freed_state_bytes == 2 * 8 * (24 + 6) + 2 * 4  # moments; scalar steps
    net[0].channels.reset()
    step(net, optimizer, 2)
    assert handle.freed_state_bytes == 0


def test_a_plain_optimizer_loads_zeros(make):
    net = net_of_two()
    optimizer = make(net.parameters())
    handle = neq.attach(optimizer, net, free_frozen_state=True)
    step(net, optimizer, 0)
    net[0].channels.set([])
    step(net, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert net[0].weight not in optimizer.state
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    plain = make(plain_net.parameters())
    plain.load_state_dict(saved)
    for value in plain.state[plain_net[0].weight].values():
        assert bool((value == 0).all())
    step(plain_net, plain, 2)
    optimizer.load_state_dict(saved)
    freed = handle.freed_state_bytes
    step(net, optimizer, 2)
    assert net[0].weight not in optimizer.state
    assert handle.freed_state_bytes > freed


def test_only_where_the_state_would_be_zeros():
    net = net_of_two()
    for optimizer_class, frozen_state in ((Adam, "keep"), (Adam, "reference"), (RMSprop, "reset")):
        optimizer = optimizer_class(net.parameters())
        with pytest.raises(ValueError, match="free_frozen_state: expected SGD, Adam or AdamW and"):
            neq.attach(optimizer, net, frozen_state, free_frozen_state=True)
    with pytest.raises(TypeError, match="free_frozen_state: expected a bool, got int"):
        neq.attach(Adam(net.parameters()), net, free_frozen_state=3)
