"""Optimizers without row steps: frozen neurons are put back after every step."""

from __future__ import annotations

import warnings

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Muon, NAdam, RMSprop, Rprop

from neq_kernels.conversion.convert import convert
from neq_kernels.optim import attach
from tests.support.optimizer_nets import (
    frozen_rows,
    layers,
    make_net,
    owner_masks,
    plain_net,
    random_masks,
    set_gradients,
)


class NesterovByHand(SGD):
    """A user's own subclass: it must not be mistaken for torch's class."""


GUARDED = {
    "RMSprop": lambda ps: RMSprop(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda ps: Adagrad(ps, lr=0.01, initial_accumulator_value=0.5, weight_decay=0.1),
    "Lion": lambda ps: Lion(ps, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda ps: Adadelta(ps, weight_decay=0.1),
    "Rprop": Rprop,
    "NAdam": lambda ps: NAdam(ps, weight_decay=0.1),
    "Adafactor": Adafactor,
    "subclass of SGD": lambda ps: NesterovByHand(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "differentiable group": lambda ps: Adam(
        [{"params": ps, "differentiable": True}], weight_decay=0.1
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")


@pytest.fixture(params=GUARDED, name="make")
def make_fixture(request):
    return GUARDED[request.param]


def finite_gradients(net, generator):
    """Zero, not NaN, where frozen: these optimizers do read every row."""
    set_gradients(net, generator)
    for p in net.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(0.0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_frozen_neurons_and_their_state_are_held(make, channels_last):
    net = make_net(channels_last=channels_last)
    optimizer = make(net.parameters())
    attach(optimizer, net)
    generator = torch.Generator().manual_seed(0)
    owned = dict(net.named_parameters())
    finite_gradients(net, generator)
    optimizer.step()
    for _ in range(5):
        random_masks(net, generator)
        masks = owner_masks(net)
        finite_gradients(net, generator)

        def held(masks=masks):
            rows = {}
            for name, mask in masks.items():
                p = owned[name]
                rows[name] = frozen_rows(name, mask, p)
                for key, value in optimizer.state[p].items():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        rows[name, key] = frozen_rows(name, mask, value)
            return rows

        before = held()
        optimizer.step()
        after = held()
        for key in before:
            assert all(map(torch.equal, before[key], after[key])), key


def test_active_neurons_are_stepped_as_ever(make):
    net, plain = make_net(), plain_net()
    optimizer, expected = make(net.parameters()), make(plain.parameters())
    attach(optimizer, net)
    layers(net)["linear"].channels.set([1, 3])
    for seed in range(4):
        for model, opt in ((net, optimizer), (plain, expected)):
            finite_gradients(model, torch.Generator().manual_seed(seed))
            opt.step()
    if not isinstance(optimizer, Adafactor):  # it scales by the norm of the whole parameter
        assert torch.equal(net.linear.weight[[1, 3]], plain.linear.weight[[1, 3]])
    assert torch.equal(net.conv.weight, plain.conv.weight)
    assert torch.equal(net.gain, plain.gain)


def test_an_optimizer_that_moves_parameters_without_gradient_is_put_back_too():
    class Drifting(torch.optim.Optimizer):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1)

    net = make_net()
    optimizer = Drifting(net.parameters(), {})
    attach(optimizer, net)
    layers(net)["conv"].channels.set([])
    layers(net)["linear"].channels.set([0])
    before, linear = net.conv.weight.detach().clone(), net.linear.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.conv.weight, before)
    assert torch.equal(net.linear.weight[1:], linear[1:])
    assert torch.equal(net.linear.weight[0], linear[0] + 1)


def test_other_state_is_named_in_one_warning():
    net = make_net()
    optimizer = NAdam(net.parameters())
    attach(optimizer, net)
    layers(net)["conv"].channels.set([0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            finite_gradients(net, torch.Generator().manual_seed(seed))
            optimizer.step()
    (warning,) = caught
    assert str(warning.message).startswith("NAdam: frozen neurons do not move")
    assert ": mu_product, step; a neuron that thaws is stepped as if" in str(warning.message)


def test_no_warning_where_all_state_has_rows():
    net = make_net()
    optimizer = Lion(net.parameters(), lr=0.01)
    attach(optimizer, net)
    layers(net)["conv"].channels.set([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finite_gradients(net, torch.Generator().manual_seed(0))
        optimizer.step()


def test_a_step_that_raised_is_not_mixed_up_with_the_next():
    net = make_net()
    optimizer = RMSprop(net.parameters(), lr=0.01)
    attach(optimizer, net)
    linear = layers(net)["linear"]
    linear.channels.set([0])

    def closure():
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        optimizer.step(closure)
    linear.channels.reset()
    before = net.linear.weight.detach().clone()
    finite_gradients(net, torch.Generator().manual_seed(0))
    optimizer.step()
    assert (net.linear.weight != before).all()


def test_one_group_guarded_the_other_by_rows():
    net = make_net()
    optimizer = Adam(
        [
            {"params": net.conv.parameters(), "differentiable": True},
            {"params": net.linear.parameters()},
        ],
        weight_decay=0.1,
    )
    handle = attach(optimizer, net)
    assert {u.name: u.update for u in handle.report()} == {
        "conv.weight": "guard",
        "conv.bias": "guard",
        "linear.weight": "rows",
        "linear.bias": "rows",
    }
    layers(net)["conv"].channels.set([3])
    layers(net)["linear"].channels.set([1])
    before = [p.detach().clone() for p in (net.conv.weight, net.linear.weight)]
    for seed in range(3):
        finite_gradients(net, torch.Generator().manual_seed(seed))
        optimizer.step()
    for now, old, active in zip((net.conv.weight, net.linear.weight), before, (3, 1), strict=True):
        others = [k for k in range(len(old)) if k != active]
        assert torch.equal(now.detach()[others], old[others])
        assert not torch.equal(now.detach()[active], old[active])
    assert "neq_step" not in optimizer.state[net.conv.weight]


def test_a_sparse_gradient_takes_the_guard_for_that_step():
    net = make_net()
    optimizer = SGD(net.linear.parameters(), lr=0.1)
    attach(optimizer, net)
    layers(net)["linear"].channels.set([0, 2])
    before = net.linear.weight.detach().clone()
    grad = torch.ones_like(before)
    net.linear.weight.grad = grad.to_sparse()
    optimizer.step()
    assert torch.equal(net.linear.weight[[1, 3, 4]], before[[1, 3, 4]])
    torch.testing.assert_close(net.linear.weight[[0, 2]], before[[0, 2]] - 0.1)


@pytest.mark.parametrize(
    ("flag", "error"), [("capturable", AssertionError), ("differentiable", RuntimeError)]
)
def test_what_torch_refuses_is_left_to_torch(flag, error):
    """Parameters of a module are leaves, on the CPU here: torch's own errors come, and nothing
    is lost."""
    net = make_net()
    optimizer = Adam(net.parameters(), **{flag: True})
    handle = attach(optimizer, net)
    reasons = {u.reason for u in handle.report() if u.update == "guard"}
    assert [reason.startswith(f"{flag}=True: ") for reason in reasons] == [True]
    layers(net)["linear"].channels.set([0])
    finite_gradients(net, torch.Generator().manual_seed(0))
    grads = [p.grad for p in net.parameters()]
    with pytest.raises(error):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))


def test_counts_end_where_torch_steps_all_neurons():
    net = make_net()
    optimizer = Adam(net.linear.parameters())
    attach(optimizer, net, "keep")
    layers(net)["linear"].channels.set([0])
    for differentiable in (False, True, False):
        optimizer.param_groups[0]["differentiable"] = differentiable
        finite_gradients(net, torch.Generator().manual_seed(0))
        optimizer.step()
    assert optimizer.state[net.linear.weight]["neq_step"].tolist() == [3, 2, 2, 2, 2]


def test_muon_updates_active_rows_as_if_the_others_were_not_there():
    """It mixes rows: what was left in the momentum of a frozen one would change all the others."""
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(8, 6, bias=False)))
    optimizer = Muon(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(optimizer, net)
    active = [0, 2, 3]
    generator = torch.Generator().manual_seed(0)
    p = net[0].weight
    p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    net[0].channels.set(active)
    small = nn.Parameter(p.detach()[active].clone())
    alone = Muon([small], lr=0.1, weight_decay=0.1)
    alone.state[small]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"][active].clone()
    frozen = p.detach()[[1, 4, 5]].clone()
    for _ in range(5):
        grad = torch.randn(p.shape, generator=generator)
        grad[[1, 4, 5]] = 0
        p.grad, small.grad = grad, grad[active].clone()
        optimizer.step()
        alone.step()
        assert torch.equal(p.detach()[[1, 4, 5]], frozen)
        assert bool((optimizer.state[p]["momentum_buffer"][[1, 4, 5]] == 0).all())
        # Newton-Schulz runs in bfloat16.
        torch.testing.assert_close(p.detach()[active], small.detach(), rtol=0.02, atol=2e-3)
