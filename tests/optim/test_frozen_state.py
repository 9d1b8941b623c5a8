"""The state of frozen neurons, and what happens when they are active again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from neq_kernels.conversion.convert import convert, revert
from neq_kernels.optim import attach

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD dampening": lambda ps: SGD(ps, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda ps: Adam(ps, lr=0.1, amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.1, amsgrad=True),
}
MODES = ["reset", "keep", "reference"]
MOMENTS = ["momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


@pytest.fixture(params=MAKE, name="make")
def make_fixture(request):
    return MAKE[request.param]


def linear(k=6):
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(4, k))).double()


def step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def trained(make, mode, n_steps=3):
    net = linear()
    optimizer = make(net.parameters())
    attach(optimizer, net, mode)
    for seed in range(n_steps):
        step(net, optimizer, seed)
    return net, optimizer, optimizer.state[net[0].weight]


def moments(state):
    return {key: state[key].clone() for key in MOMENTS if state.get(key) is not None}


def test_reset_clears_everything_of_a_frozen_neuron_and_nothing_else(make):
    net, optimizer, state = trained(make, "reset")
    net[0].channels.set([1, 4])
    frozen = [0, 2, 3, 5]
    step(net, optimizer, 10)
    for tensor in moments(state).values():
        assert (tensor[frozen] == 0).all()
        assert (tensor[[1, 4]] != 0).all()
    if "step" in state:
        assert state["neq_step"].tolist() == [0, 4, 0, 0, 4, 0]
        assert state["step"] == 4


def test_keep_holds_the_state_bit_for_bit(make):
    net, optimizer, state = trained(make, "keep")
    before = moments(state)
    net[0].channels.set([1, 4])
    for seed in range(5):
        step(net, optimizer, seed)
    frozen = [0, 2, 3, 5]
    for key, tensor in moments(state).items():
        assert torch.equal(tensor[frozen], before[key][frozen])
    if "step" in state:
        assert state["neq_step"].tolist() == [3, 8, 3, 3, 8, 3]
        assert state["step"] == 8


def test_reference_decays_the_second_moment_and_counts_on(make):
    net, optimizer, state = trained(make, "reference")
    before = moments(state)
    net[0].channels.set([1, 4])
    frozen = [0, 2, 3, 5]
    for seed in range(5):
        step(net, optimizer, seed)
    after = moments(state)
    for key in {"momentum_buffer", "exp_avg"} & after.keys():
        assert (after[key][frozen] == 0).all()
    if "step" in state:
        torch.testing.assert_close(
            after["exp_avg_sq"][frozen], before["exp_avg_sq"][frozen] * 0.999**5
        )
        assert torch.equal(after["max_exp_avg_sq"][frozen], before["max_exp_avg_sq"][frozen])
        assert state["neq_step"].tolist() == [8] * 6
        assert state["step"] == 8


@pytest.mark.parametrize("mode", MODES)
def test_frozen_neurons_do_not_move_over_many_steps(make, mode):
    net, optimizer, _ = trained(make, mode)
    net[0].channels.set([2])
    frozen = [0, 1, 3, 4, 5]
    before = [p.detach()[frozen].clone() for p in net.parameters()]
    for seed in range(100):
        step(net, optimizer, seed)
    for p, held in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.detach()[frozen], held)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_before", [0, 3])
def test_zero_gradients_of_a_wholly_frozen_layer_are_no_gradients(make, mode, n_before):
    """Data parallel fills them with zeros, one process leaves None: the runs must not differ."""
    results = []
    for filler in (lambda p: None, torch.zeros_like):
        net, optimizer, state = trained(make, mode, n_before)
        net[0].channels.set([])
        held = [p.detach().clone() for p in net.parameters()]
        for _ in range(4):
            for p in net.parameters():
                p.grad = filler(p)
            optimizer.step()
        assert all(map(torch.equal, net.parameters(), held))
        net[0].channels.set([0, 3])
        for seed in range(3):
            step(net, optimizer, seed)
        results.append((list(net.parameters()), optimizer.state_dict()["state"]))
    (p, state), (q, other) = results
    assert all(map(torch.equal, p, q))
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def test_a_parameter_without_gradient_is_skipped_as_torch_does(make):
    net, optimizer, state = trained(make, "reset")
    net[0].channels.set([1, 4])
    step(net, optimizer, 3)
    before, held = [p.detach().clone() for p in net.parameters()], moments(state)
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    assert all(torch.equal(state[key], held[key]) for key in held)
    if "step" in state:
        assert state["step"] == 4


@pytest.mark.parametrize("mode", ["reset", "keep"])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_a_neuron_that_comes_back_takes_no_leap(optimizer_class, mode):
    """1000 steps of others meanwhile: its bias correction is the one of its own count."""
    net = linear()
    optimizer = optimizer_class(net.parameters(), lr=0.01, weight_decay=0)
    attach(optimizer, net, mode)
    step(net, optimizer, 0)
    net[0].channels.set([1])
    for seed in range(1000):
        step(net, optimizer, seed)
    net[0].channels.reset()
    for seed in range(5):
        before = net[0].weight.detach().clone()
        step(net, optimizer, seed)
        # A first Adam step is lr; later ones exceed it little while the gradients keep their size.
        assert (net[0].weight.detach() - before).abs().max() <= 0.01 * 1.5


def test_the_scalar_step_is_always_the_largest_count():
    net = linear(4)
    optimizer = Adam(net.parameters())
    attach(optimizer, net, "keep")
    state = optimizer.state[net[0].weight]
    history = [[0, 1, 2, 3], [0], [0], [1], [1], [1], [1], [], [2, 3], [1, 2], [0, 1, 2, 3]]
    counts = [0] * 4
    for active in history:
        net[0].channels.set(active)
        step(net, optimizer, 0)
        counts = [c + (k in active) for k, c in enumerate(counts)]
        state = optimizer.state[net[0].weight]
        assert state.get("neq_step", torch.tensor(counts)).tolist() == counts
        assert state["step"] == max(counts)


def test_wholly_reset_is_a_fresh_start():
    net, optimizer, state = trained(MAKE["Adam"], "reset")
    net[0].channels.set([])
    optimizer.step()
    assert state["step"] == 0
    assert all((tensor == 0).all() for tensor in moments(state).values())
    net[0].channels.reset()
    step(net, optimizer, 0)
    assert state["step"] == 1


def test_a_set_that_changes_and_changes_back_between_steps_resets_nothing():
    net, optimizer, state = trained(MAKE["Adam"], "reset")
    net[0].channels.set([0])
    net[0].channels.reset()
    step(net, optimizer, 0)
    assert state["step"] == 4
    assert (state["exp_avg"] != 0).all()


def test_a_layer_frozen_before_its_first_step_gets_no_state():
    net = linear()
    net[0].channels.set([])
    optimizer = Adam(net.parameters())
    attach(optimizer, net)
    step(net, optimizer, 0)
    assert not optimizer.state


def test_a_user_who_clears_the_state_starts_afresh():
    net, optimizer, _ = trained(MAKE["Adam"], "keep")
    net[0].channels.set([0])
    step(net, optimizer, 0)
    step(net, optimizer, 0)
    net[0].channels.set([1])
    step(net, optimizer, 0)
    optimizer.state.clear()
    step(net, optimizer, 0)
    state = optimizer.state[net[0].weight]
    assert state["neq_step"].tolist() == [0, 1, 0, 0, 0, 0]
    assert state["step"] == 1


def test_converting_again_resets_what_was_trained_in_between(make):
    net, optimizer, state = trained(make, "reset")
    net[0].channels.set([0])
    step(net, optimizer, 0)
    revert(net)
    step(net, optimizer, 1)
    convert(net)
    net[0].channels.set([0])
    step(net, optimizer, 2)
    for tensor in moments(state).values():
        assert (tensor[1:] == 0).all()
        assert (tensor[0] != 0).all()


def test_fused_sgd_with_a_layer_that_starts_late():
    """torch's kernel takes momentum buffers for all parameters or for none."""
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))).double()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    attach(optimizer, net)
    net[0].channels.set([])
    step(net, optimizer, 0)
    net[0].channels.reset()
    before = net[0].weight.detach().clone()
    step(net, optimizer, 1)
    torch.testing.assert_close(net[0].weight.detach(), before - 0.1 * net[0].weight.grad)
    assert torch.equal(optimizer.state[net[0].weight]["momentum_buffer"], net[0].weight.grad)
