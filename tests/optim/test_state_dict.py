"""Checkpoints: with torch's own optimizers both ways, and in bf16."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from neq_kernels.conversion.convert import convert
from neq_kernels.optim import attach

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "SGD dampening": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True),
    "AdamW fused": lambda ps: AdamW(ps, lr=0.1, fused=True),
}


@pytest.fixture(params=MAKE, name="make")
def make_fixture(request):
    return MAKE[request.param]


def make_net(dtype=torch.float64):
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).to(dtype)


def step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def paused(make, mode="keep", dtype=torch.float64):
    """A net whose first layer has had neurons frozen, with its attached optimizer."""
    net = make_net(dtype)
    optimizer = make(net.parameters())
    attach(optimizer, net, mode)
    step(net, optimizer, 0)
    net[0].channels.set([0, 2, 5])
    step(net, optimizer, 1)
    step(net, optimizer, 2)
    return net, optimizer


@pytest.mark.parametrize("mode", ["reset", "keep", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_run(make, mode, dtype):
    net, optimizer = paused(make, mode, dtype)
    net[0].channels.set([2, 3, 4])  # decided after the last step, before the checkpoint
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = make_net(dtype)
    resumed.load_state_dict(saved["net"])
    resumed[0].channels.set([2, 3, 4])
    again = make(resumed.parameters())
    attach(again, resumed, mode)
    again.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        for model, opt in ((net, optimizer), (resumed, again)):
            model[0].channels.set([2, 3, 4] if seed < 5 else [0, 1, 2, 3])
            step(model, opt, seed)
    assert all(map(torch.equal, net.parameters(), resumed.parameters()))
    torch.testing.assert_close(
        optimizer.state_dict()["state"], again.state_dict()["state"], rtol=0, atol=0
    )


def test_loading_before_attaching_is_the_same(make):
    net, optimizer = paused(make)
    saved = through_a_file(optimizer.state_dict())
    other = copy.deepcopy(net)
    again = make(other.parameters())
    again.load_state_dict(saved)
    attach(again, other, "keep")
    step(net, optimizer, 3)
    step(other, again, 3)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_counts_are_digits_in_a_state_dict_and_stay_counts_in_the_optimizer():
    net, optimizer = paused(MAKE["Adam"])
    optimizer.state[net[0].weight]["neq_step"][1] = 3 + 128 * 5 + 128**3
    saved = optimizer.state_dict()
    digits = [[3, 0, 0, 0, 0], [3, 5, 0, 1, 0], [3, 0, 0, 0, 0], *[[1, 0, 0, 0, 0]] * 2]
    assert saved["state"][0]["neq_step"].tolist() == [*digits, [3, 0, 0, 0, 0]]
    assert saved["state"][0]["neq_step"].dtype == torch.uint8
    assert saved["state"][0]["step"] == 3
    assert optimizer.state[net[0].weight]["neq_step"].dtype == torch.int64


def test_counts_that_0_1_0_saved_as_a_list_are_loaded():
    net, optimizer = paused(MAKE["Adam"])
    saved = optimizer.state_dict()
    saved["state"][0]["neq_step"] = [3, 2, 3, 2, 2, 3]
    optimizer.load_state_dict(through_a_file(saved))
    assert optimizer.state[net[0].weight]["neq_step"].tolist() == [3, 2, 3, 2, 2, 3]


def test_parameters_without_counts_say_so_and_load_without():
    net, optimizer = paused(MAKE["Adam"])
    saved = through_a_file(optimizer.state_dict())
    assert (saved["state"][2]["neq_step"] == 127).all()
    optimizer.load_state_dict(saved)
    assert "neq_step" not in optimizer.state[net[1].weight]


@pytest.mark.parametrize("thaws", [False, True])
def test_a_wholly_frozen_parameter_without_state_is_saved_as_zeros(make, thaws):
    net = make_net()
    net[0].channels.set([])
    optimizer = make(net.parameters())
    attach(optimizer, net)
    step(net, optimizer, 0)
    assert net[0].weight not in optimizer.state
    if thaws:  # before the checkpoint
        net[0].channels.reset()
    saved = through_a_file(optimizer.state_dict())["state"][0]
    assert all(bool((tensor == 0).all()) for tensor in saved.values())
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    plain = make(plain_net.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    step(plain_net, plain, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_counts_survive_low_precision(dtype):
    net, optimizer = paused(MAKE["Adam"], dtype=dtype)
    optimizer.state[net[0].weight]["neq_step"][:] = torch.tensor([70_001, 3, 4, 5, 6, 70_003])
    optimizer.state[net[0].weight]["step"].fill_(70_003)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    state = optimizer.state[net[0].weight]
    assert state["neq_step"].tolist() == [70_001, 3, 4, 5, 6, 70_003]
    assert state["exp_avg"].dtype == dtype


def test_a_plain_optimizer_loads_the_state_and_continues(make):
    net, optimizer = paused(make)
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    plain_net.load_state_dict(net.state_dict())
    plain = make(plain_net.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for seed in range(3):
        step(plain_net, plain, seed)
    state = plain.state[plain_net[0].weight]
    if "step" in state:
        assert state["step"] == 6
        # Back again: the counts of the pause are history, every neuron has stepped since.
        optimizer.load_state_dict(through_a_file(plain.state_dict()))
        net[0].channels.set([1])
        step(net, optimizer, 0)
        assert optimizer.state[net[0].weight]["neq_step"].tolist() == [6, 7, 6, 6, 6, 6]


def test_a_plain_state_is_loaded_and_continued(make):
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    net = make_net()
    plain_net.load_state_dict(net.state_dict())
    plain, optimizer = make(plain_net.parameters()), make(net.parameters())
    attach(optimizer, net, "keep")
    for seed in range(3):
        step(plain_net, plain, seed)
    net.load_state_dict(plain_net.state_dict())
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    net[0].channels.set([1, 2])
    step(net, optimizer, 3)
    step(plain_net, plain, 3)
    torch.testing.assert_close(net[0].weight[[1, 2]], plain_net[0].weight[[1, 2]])
    assert torch.equal(net[1].weight, plain_net[1].weight)
    if "step" in plain.state[plain_net[0].weight]:
        assert optimizer.state[net[0].weight]["neq_step"].tolist() == [3, 4, 4, 3, 3, 3]


def test_counts_of_another_number_of_neurons_are_refused():
    _, optimizer = paused(MAKE["Adam"])
    saved = optimizer.state_dict()
    saved["state"][0]["neq_step"] = [1, 2]
    with pytest.raises(ValueError, match=r"0\.weight: expected neq_step of 6 neurons, got .*2"):
        optimizer.load_state_dict(saved)


def test_a_loaded_state_is_reset_for_the_neurons_frozen_now():
    net, optimizer = paused(MAKE["SGD"], "reset")
    plain = make_net()
    trained = MAKE["SGD"](plain.parameters())
    step(plain, trained, 0)
    optimizer.load_state_dict(trained.state_dict())
    step(net, optimizer, 1)
    assert (optimizer.state[net[0].weight]["momentum_buffer"][[1, 3, 4]] == 0).all()


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_the_state_row_steps_make_is_stored_as_torch_stores_it(default_dtype, fused):
    net = make_net(torch.float32).append(nn.Conv2d(2, 3, 2)).to(memory_format=torch.channels_last)
    plain_net = copy.deepcopy(net)
    net[0].channels.set([0])
    convert(net)[2].channels.set([1])
    optimizer = Adam(net.parameters(), amsgrad=True, fused=fused)
    plain = Adam(plain_net.parameters(), amsgrad=True, fused=fused)
    attach(optimizer, net)
    torch.set_default_dtype(default_dtype)
    try:
        step(net, optimizer, 0)
        step(plain_net, plain, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
        ours = {key: value for key, value in optimizer.state[p].items() if key != "neq_step"}
        theirs = plain.state[q]
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            assert ours[key].stride() == theirs[key].stride()
            assert ours[key].shape == theirs[key].shape
        assert ours["step"] == theirs["step"] == 1
