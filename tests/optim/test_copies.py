"""A copy or a pickle of an attached optimizer is attached to the copy of the model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adam, RMSprop

from neq_kernels.conversion.convert import convert
from neq_kernels.optim import attach, is_attached

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.1, weight_decay=0.1),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")


def through_pickle(things):
    return pickle.loads(pickle.dumps(things))


def through_torch_save(things):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = [copy.deepcopy, through_pickle, through_torch_save]


def trained(make, frozen_state="keep"):
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).double()
    optimizer = make(net.parameters())
    attach(optimizer, net, frozen_state)
    step(net, optimizer, 0)
    net[0].channels.set([0, 2, 5])
    step(net, optimizer, 1)
    return net, optimizer


def step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_model_and_optimizer_copied_together_train_on(make, copier, optimizer_first):
    net, optimizer = trained(make)
    if optimizer_first:
        again, other = copier([optimizer, net])
    else:
        other, again = copier([net, optimizer])
    assert other[0].weight is again.param_groups[0]["params"][0]
    other[0].channels.set([1])  # the original's masks stay
    for seed in (2, 3):
        before = other[0].weight.detach().clone()
        step(other, again, seed)
        assert (other[0].weight.detach() != before).any(1).nonzero().flatten().tolist() == [1]
    assert is_attached(other)
    net[0].channels.set([1])
    for seed in (2, 3):
        step(net, optimizer, seed)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    torch.testing.assert_close(
        optimizer.state_dict()["state"], again.state_dict()["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_of_a_copy_and_one_of_the_optimizer_alone(copier):
    net, optimizer = trained(MAKE["Adam"])
    lone = copier(copier(optimizer))
    params = lone.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    lone.step()
    assert (params[0].detach() != before[0]).any(1).nonzero().flatten().tolist() == [0, 2, 5]
    assert not any(p is q for p, q in zip(params, net.parameters(), strict=True))
    with pytest.raises(ValueError, match="call remove"):
        attach(lone, net)


def test_the_first_use_of_a_copy_may_be_a_checkpoint():
    net, optimizer = trained(MAKE["Adam"])
    _, again = copy.deepcopy((net, optimizer))
    saved = again.state_dict()
    assert saved["state"][0]["neq_step"][:, 0].tolist() == [2, 1, 2, 1, 1, 2]
    third, loaded = copy.deepcopy((net, optimizer))
    loaded.load_state_dict(saved)
    assert loaded.state[third[0].weight]["neq_step"].tolist() == [2, 1, 2, 1, 1, 2]


def test_a_copy_has_options_of_its_own_and_the_users_hooks_stay_behind():
    net, optimizer = trained(MAKE["Adam"], "reset")
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append(args))
    other, again = copy.deepcopy((net, optimizer))
    again.register_step_post_hook(lambda *args: None)
    other[0].channels.set([0])
    step(other, again, 2)
    assert not calls
    assert again.state[other[0].weight]["neq_step"].tolist() == [3, 0, 0, 0, 0, 0]
    assert optimizer.state[net[0].weight]["neq_step"].tolist() == [2, 0, 2, 0, 0, 2]


def test_a_removed_optimizer_is_copied_as_torch_does():
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 6)))
    optimizer = Adam(net.parameters())
    handle = attach(optimizer, net)
    handle.remove()
    handle.remove()
    clone = copy.deepcopy(optimizer)
    assert not clone._optimizer_step_pre_hooks
    assert "__getstate__" not in clone.__dict__
    assert all(type(p) is Parameter for p in clone.param_groups[0]["params"])
