"""What a training script does with its optimizer works as before."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from neq_kernels.conversion.convert import convert
from neq_kernels.optim import attach

OPTIMIZERS = {
    "SGD": lambda ps, **kw: SGD(ps, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, **kw}),
    "AdamW": lambda ps, **kw: AdamW(ps, **{"lr": 0.05, "weight_decay": 0.1, **kw}),
}
X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(10, 4)


@pytest.fixture(params=OPTIMIZERS, name="make")
def make_fixture(request):
    return OPTIMIZERS[request.param]


def pair(dtype=torch.float64):
    """A converted net with frozen neurons, and its plain twin."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).to(dtype)
    return net, plain


ACTIVE, FROZEN = [0, 2, 5], [1, 3, 4]


def freeze(net):
    net[0].channels.set(ACTIVE)


def loss_of(net, scale=1.0):
    return net(X.to(next(net.parameters()).dtype)).square().sum() * scale


def assert_same_active(net, plain, **tolerance):
    """Active neurons as in the twin, whose other neurons the caller has held in place."""
    torch.testing.assert_close(list(net.parameters()), list(plain.parameters()), **tolerance)


def undo_frozen(plain, before):
    """The plain twin's way to freeze: put the rows back after the step."""
    with torch.no_grad():
        for p, old in zip(plain[0].parameters(), before, strict=True):
            p[FROZEN] = old[FROZEN]


def rows_of(plain):
    return [p.detach().clone() for p in plain[0].parameters()]


def train_both(make, train_step, dtype=torch.float64, scheduler_first=False, **flags):
    net, plain = pair(dtype)
    optimizer, expected = make(net.parameters(), **flags), make(plain.parameters(), **flags)
    if not scheduler_first:
        attach(optimizer, net, "keep")
    tools = (train_step(net, optimizer), train_step(plain, expected))
    if scheduler_first:
        attach(optimizer, net, "keep")
    freeze(net)
    for i in range(6):
        before = rows_of(plain)
        tools[0](i)
        tools[1](i)
        undo_frozen(plain, before)
    assert_same_active(net, plain)
    return net, optimizer, plain, expected


def test_a_closure_runs_once_with_gradients_on_and_its_loss_is_returned(make):
    net, plain = pair()
    optimizer, expected = make(net.parameters()), make(plain.parameters())
    attach(optimizer, net)
    freeze(net)
    calls = []

    def closure_for(model, opt):
        def closure():
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        return closure

    for call in (
        lambda opt, closure: opt.step(closure),
        lambda opt, closure: opt.step(closure=closure),
    ):
        calls.clear()
        loss = call(optimizer, closure_for(net, optimizer))
        assert calls == [True]
        assert loss.item() == pytest.approx(loss_of(plain).item())
        before = rows_of(plain)
        call(expected, closure_for(plain, expected))
        undo_frozen(plain, before)
    assert_same_active(net, plain)
    assert optimizer.step() is None
    assert optimizer.step(None) is None


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
)
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers(make, scheduler, scheduler_first):
    def train_step(model, opt):
        sched = scheduler(opt)

        def one(i):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
            sched.step()

        return one

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_both(make, train_step, scheduler_first=scheduler_first)


def gradient_descent(model, opt):
    def one(i):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()

    return one


@pytest.mark.parametrize("foreach", [True, False, None])
def test_learning_rate_as_a_tensor(make, foreach):
    if foreach and make is OPTIMIZERS["AdamW"]:
        with pytest.raises(ValueError, match="lr as a Tensor"):
            make([torch.zeros(1)], lr=torch.tensor(0.05), foreach=True)
        return

    def halving(model, opt):
        one = gradient_descent(model, opt)

        def step(i):
            one(i)
            opt.param_groups[0]["lr"].mul_(0.5)

        return step

    lr = torch.tensor(0.05, dtype=torch.float64)
    net, plain = pair()
    optimizer = make(net.parameters(), lr=lr.clone(), foreach=foreach)
    expected = make(plain.parameters(), lr=lr.clone(), foreach=foreach)
    attach(optimizer, net, "keep")
    freeze(net)
    ours, theirs = halving(net, optimizer), halving(plain, expected)
    for i in range(4):
        before = rows_of(plain)
        ours(i), theirs(i)
        undo_frozen(plain, before)
    assert_same_active(net, plain)


def test_groups_with_settings_of_their_own_and_a_group_added_later(make):
    net, plain = pair()

    def groups(model):
        return [
            {"params": [model[0].weight], "lr": 0.01, "weight_decay": 0.0},
            {"params": [model[0].bias], "lr": 0.1},
        ]

    optimizer, expected = make(groups(net)), make(groups(plain))
    attach(optimizer, net, "keep")
    freeze(net)
    net[2].channels.set([1])
    for i in range(6):
        if i == 3:
            optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.02})
            expected.add_param_group({"params": plain[2].parameters(), "lr": 0.02})
        before, head = rows_of(plain), [p.detach().clone() for p in plain[2].parameters()]
        for model, opt in ((net, optimizer), (plain, expected)):
            model.zero_grad()
            loss_of(model).backward()
            opt.step()
        undo_frozen(plain, before)
        with torch.no_grad():
            for p, old in zip(plain[2].parameters(), head, strict=True):
                p[[0, 2]] = old[[0, 2]]
    assert_same_active(net, plain)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_with_a_step_that_overflows(make, fused, unscale_first):
    scalers = []

    def train_step(model, opt):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scalers.append(scaler)

        def one(i):
            opt.zero_grad()
            scaler.scale(loss_of(model, float("inf") if i == 2 else 1.0)).backward()
            if unscale_first:
                scaler.unscale_(opt)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(opt)
            scaler.update()
            if i == 2:
                assert all(map(torch.equal, model.parameters(), before))

        return one

    net, optimizer, plain, expected = train_both(make, train_step, dtype=torch.float32, fused=fused)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(net[2].parameters(), plain[2].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    active = torch.tensor(ACTIVE)
    torch.testing.assert_close(net[0].weight.grad[active], plain[0].weight.grad[active])
    if "step" in optimizer.state[net[0].weight]:
        assert optimizer.state[net[0].weight]["step"] == 5
        assert expected.state[plain[0].weight]["step"] == 5


def test_gradients_stay_where_they_are(make):
    net, _ = pair()
    optimizer = make(net.parameters())
    attach(optimizer, net)
    freeze(net)
    loss_of(net).backward()
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() for g in grads]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert all(map(torch.equal, grads, values))


def test_nothing_is_lost_when_torchs_step_raises():
    """Adam refuses the sparse gradient of a parameter beside the neurons."""
    net, _ = pair()
    other = nn.Embedding(5, 2, sparse=True).double()
    optimizer = Adam([*net.parameters(), *other.parameters()])
    attach(optimizer, net)
    freeze(net)
    (loss_of(net) + other(torch.tensor([1])).sum()).backward()
    grads = [p.grad for p in net.parameters()]
    groups = [list(group["params"]) for group in optimizer.param_groups]
    frozen = net[0].weight.detach()[FROZEN].clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert [[id(p) for p in g] for g in groups] == [
        [id(p) for p in group["params"]] for group in optimizer.param_groups
    ]
    assert torch.equal(net[0].weight.detach()[FROZEN], frozen)


def test_nothing_happens_when_the_closure_raises(make):
    net, _ = pair()
    optimizer = make(net.parameters())
    attach(optimizer, net)
    freeze(net)
    loss_of(net).backward()
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        optimizer.step(closure)
    assert all(map(torch.equal, net.parameters(), before))
    assert all(p.grad is not None for p in net.parameters())
    assert not optimizer.state


@pytest.mark.parametrize("guarded", [False, True])
def test_the_users_hooks_run_around_the_row_steps(guarded):
    """Registered before or after attach: gradients may be changed before, weights read after."""
    net, _ = pair()
    make = torch.optim.RMSprop if guarded else SGD
    optimizer = make(net.parameters(), lr=0.5, weight_decay=0.1)
    seen = []

    def no_gradient_for_neuron_0(opt, args, kwargs):
        net[0].weight.grad[0] = 0
        net[0].weight.data[0] = 0

    def read(opt, args, kwargs):
        seen.append(net[0].weight.detach().clone())

    optimizer.register_step_post_hook(read)
    attach(optimizer, net)
    optimizer.register_step_pre_hook(no_gradient_for_neuron_0)
    optimizer.register_step_post_hook(read)
    freeze(net)
    loss_of(net).backward()
    before = net[0].weight.detach().clone()
    optimizer.step()
    for weight in seen:
        assert torch.equal(weight, net[0].weight)
        assert torch.equal(weight[FROZEN], before[FROZEN])
        assert (weight[0] == 0).all()
        assert (weight[[2, 5]] != before[[2, 5]]).all()


def test_gradients_clipped_between_backward_and_step(make):
    def train_step(model, opt):
        def one(i):
            opt.zero_grad()
            loss_of(model).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            opt.step()

        return one

    train_both(make, train_step)


def test_a_step_compiled_by_the_user(make):
    net, plain = pair()
    optimizer, expected = make(net.parameters()), make(plain.parameters())
    attach(optimizer, net, "keep")
    freeze(net)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        before = rows_of(plain)
        for model, opt, step in ((net, optimizer, compiled), (plain, expected, expected.step)):
            opt.zero_grad()
            loss_of(model).backward()
            step()
        undo_frozen(plain, before)
    # Compiled, torch's own step computes Adam's bias corrections in float32.
    assert_same_active(net, plain, rtol=1e-4, atol=1e-6)
