"""Dense kernels in the place of the chosen ones: copies, removal, checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.conversion.convert import convert
from neq_kernels.dispatch.selection import selector
from neq_kernels.optim import attach, is_attached, step_check
from neq_kernels.optim.forward_watch import ForwardWatch
from tests.support.checked_steps import (
    FakeClock,
    X,
    hooks,
    is_dense,
    make,
    make_net,
    slower,
    step,
    train,
    until_verdict,
)

pytestmark = pytest.mark.usefixtures("step_check_asked_for")


def copies(things):
    yield copy.deepcopy(things)
    yield pickle.loads(pickle.dumps(things))
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("steps", range(4))
def test_copies_in_the_midst_of_a_trial_have_no_part_in_it(monkeypatch, steps):
    net, optimizer, attached = make(monkeypatch)
    while not hooks(net):
        step(net, optimizer)
    train(net, optimizer, steps)
    for other, again in copies((net, optimizer)):
        assert not is_dense(other)
        step(other, again)
        assert not hooks(other)
        assert is_attached(other)
        with monkeypatch.context() as patch:
            clock = FakeClock(other, again, slower)
            patch.setattr(step_check, "clock_of", lambda device, c=clock: c)
            until_verdict(other, again)
    assert len(hooks(net)) == (0 if steps == 3 else 3)
    assert is_dense(net) == (steps == 1)
    train(net, optimizer, 60)
    assert attached._check.dense_steps == 9
    assert is_dense(net)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("steps", range(4))
def test_remove_ends_it(monkeypatch, steps):
    net, optimizer, attached = make(monkeypatch)
    while not hooks(net):
        step(net, optimizer)
    train(net, optimizer, steps)
    attached.remove()
    assert not hooks(net)
    assert not is_dense(net)
    train(net, optimizer, 60)
    assert not is_dense(net)


@pytest.mark.usefixtures("hasty")
def test_an_optimizer_that_is_dropped_leaves_nothing_for_long(monkeypatch):
    net, optimizer, attached = make(monkeypatch)
    while not is_dense(net):
        step(net, optimizer)
    del optimizer, attached
    gc.collect()
    net(X)
    assert not hooks(net)
    optimizer = SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    assert not is_dense(net)


def test_with_everything_active_the_graph_is_pytorchs():
    layer, x = convert(nn.Conv2d(3, 8, 3)), torch.ones(2, 3, 5, 5)
    with selector.forced_strategy(Strategy.CUSTOM):
        assert type(layer(x).grad_fn).__name__ == "_PlannedFunctionBackward"
        layer.channels.serve_densely([layer.channels])
        assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"


def test_a_hook_whose_listener_is_gone_goes():
    class Listener:
        def notify(self):
            raise AssertionError("it is gone")

    layer = nn.Linear(2, 2)
    ForwardWatch([layer], Listener().notify)
    assert layer._forward_pre_hooks
    layer(torch.ones(2))
    assert not layer._forward_pre_hooks


# --- in a checkpoint -----------------------------------------------------------------------------


def resumed(net, optimizer, state, order):
    """A process that resumes: attaching, loading the table and setting the masks, in this order."""
    masks = [net[i].channels.mask for i in (0, 1, 4)]
    again = make_net()
    for layer in (again[0], again[4]):
        layer.channels.reset()
    again.load_state_dict(net.state_dict())
    other = SGD(again.parameters(), lr=0.01)
    for act in order:
        if act == "attach":
            attach(other, again)
        elif act == "load":
            neq.load_tuning_state_dict(state)
        else:
            with torch.no_grad():
                again(X)  # a probe, whose controller knows the masks
            for i, mask in zip((0, 1, 4), masks, strict=True):
                again[i].channels.set(mask)
    other.load_state_dict(optimizer.state_dict())
    return again, other


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("asked_for", ["1", ""])
@pytest.mark.parametrize("order", list(itertools.permutations(("attach", "load", "masks"))))
def test_the_verdict_is_part_of_a_checkpoint(monkeypatch, strategies, order, asked_for):
    net, optimizer, attached = make(monkeypatch)
    until_verdict(net, optimizer)
    state = json.loads(json.dumps(neq.tuning_state_dict()))
    attached.remove()
    assert not is_dense(net)
    monkeypatch.setenv(step_check.VARIABLE, asked_for)
    again, other = resumed(net, optimizer, state, order)
    assert neq.tuning_state_dict() == state  # also before the first step
    strategies.clear()
    step(again, other)
    assert set(strategies) == {Strategy.DENSE}
    assert not hooks(again)
    train(again, other, 30)
    assert is_dense(again)
    assert neq.tuning_state_dict() == state
    again[0].channels.set([1])
    assert not is_dense(again)
    train(again, other, 60)
    assert not is_dense(again)  # what was loaded decides, and nothing is compared


@pytest.mark.usefixtures("hasty")
def test_a_resumed_run_makes_the_same_bits(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    until_verdict(net, optimizer)
    state = copy.deepcopy(neq.tuning_state_dict())
    again, other = resumed(net, optimizer, state, ("attach", "load", "masks"))
    # The first run has been given the table as well: it goes on as it was.
    for steps, mask in ((5, [0, 1]), (5, [2])):
        for run in ((net, optimizer), (again, other)):
            train(*run, steps)
        assert all(map(torch.equal, net.parameters(), again.parameters()))
        for some in (net, again):
            some[4].channels.set(mask)
            assert not is_dense(some)


@pytest.mark.usefixtures("hasty")
def test_a_verdict_for_other_masks_is_not_used(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    until_verdict(net, optimizer)
    state = neq.tuning_state_dict()
    net[4].channels.set([1])
    again, other = resumed(net, optimizer, state, ("attach", "load", "masks"))
    step(again, other)
    assert not is_dense(again)
    assert "dense" not in neq.tuning_state_dict()


@pytest.mark.usefixtures("hasty")
def test_a_table_without_verdict_ends_one(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    state = neq.tuning_state_dict()
    assert "dense" not in state
    until_verdict(net, optimizer)
    neq.load_tuning_state_dict(state)
    assert not is_dense(net)


@pytest.mark.usefixtures("hasty")
def test_a_trial_is_no_verdict(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    while not is_dense(net):
        step(net, optimizer)
    assert "dense" not in neq.tuning_state_dict()


@pytest.mark.parametrize("wrong", [True, "abc", [1], None])
def test_a_checkpoint_that_says_something_else_is_refused(wrong):
    state = {**neq.tuning_state_dict(), "dense": wrong}
    with pytest.raises(ValueError, match="tuning: expected a list of strings for 'dense', got"):
        neq.load_tuning_state_dict(state)
    assert selector.context("cpu").measures
