"""torch.distributed.checkpoint, in one process: it loads what a fresh optimizer's state has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam

import neq_kernels as neq

MAKE = {
    "SGD dampening": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True),
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def fresh(make, dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))
    net = neq.convert(nn.Sequential(*layers)).to(dtype)
    optimizer = make(net.parameters())
    neq.attach(optimizer, net, "keep")
    return net, optimizer


def step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(make, flat, dtype, tmp_path):
    net, optimizer = fresh(make, dtype)
    step(net, optimizer, 0)
    net[0].channels.set([0, 2, 5])
    net[1].channels.set([])  # its state waits
    for seed in (1, 2):
        step(net, optimizer, seed)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": net.state_dict(),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)

    again, resumed = fresh(make, dtype)
    again[1].channels.set([])
    state = {
        "model": again.state_dict(),
        "optimizer": get_optimizer_state_dict(again, resumed, options=options),
    }
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(again, resumed, state["optimizer"], options=options)
    again[0].channels.set([0, 2, 5])
    for seed in (3, 4, 5):
        for model, opt in ((net, optimizer), (again, resumed)):
            if seed == 4:
                model[0].channels.set([0, 1])
                model[1].channels.set([0, 1])
            step(model, opt, seed)
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    torch.testing.assert_close(
        optimizer.state_dict()["state"], resumed.state_dict()["state"], rtol=0, atol=0
    )


def test_asking_for_a_state_that_is_never_loaded_changes_no_step():
    """Trainers ask at the start: as with torch's own step after a first one of zeros."""
    net, optimizer = fresh(MAKE["Adam"])
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    plain_net.load_state_dict(net.state_dict())
    plain = MAKE["Adam"](plain_net.parameters())
    for model, opt in ((net, optimizer), (plain_net, plain)):
        get_optimizer_state_dict(model, opt)
        step(model, opt, 0)
    assert all(map(torch.equal, net.parameters(), plain_net.parameters()))
    assert "neq_step" not in optimizer.state[net[0].weight]


@pytest.mark.parametrize("flat", [False, True])
def test_a_plain_runs_checkpoint_loads_where_missing_counts_are_allowed(flat, tmp_path):
    net, optimizer = fresh(MAKE["Adam"])
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    plain = MAKE["Adam"](plain_net.parameters())
    for seed in range(4):
        step(plain_net, plain, seed)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {"optimizer": get_optimizer_state_dict(plain_net, plain, options=options)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    state = {"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}
    with pytest.raises(CheckpointException, match="neq_step"):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=options)
    net[0].channels.set([1])
    step(net, optimizer, 0)
    assert optimizer.state[net[0].weight]["neq_step"].tolist() == [4, 5, 4, 4, 4, 4]
