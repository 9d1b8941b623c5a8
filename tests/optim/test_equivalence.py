"""attach against torch's own optimizers: everything active, and one optimizer per neuron."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW

from neq_kernels.optim import attach, reference, row_steps
from tests.support.optimizer_nets import (
    KERNELS,
    TRANSPOSED,
    frozen_rows,
    layers,
    make_net,
    owner_masks,
    plain_net,
    random_masks,
    set_gradients,
    use_kernels,
)
from tests.support.optimizer_oracle import NeuronwiseOptimizer

SGD_FLAGS = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, d, n, w, x in itertools.product(
        (0, 0.9), (0, 0.3), (False, True), (0, 0.1), (False, True)
    )
    if not (n and (m == 0 or d != 0))
]
ADAM_FLAGS = [
    {"amsgrad": a, "weight_decay": w, "maximize": x, "betas": (0.8, 0.97), "eps": 1e-6}
    for a, w, x in itertools.product((False, True), (0, 0.1), (False, True))
]
CASES = [(SGD, flags) for flags in SGD_FLAGS]
CASES += [(cls, flags) for cls in (Adam, AdamW) for flags in ADAM_FLAGS]
IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    use_kernels(monkeypatch, request.param)


def case_id(value: object) -> str | None:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items() if v) or "plain"
    return None


def gradients(net, seed):
    return set_gradients(net, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("optimizer_class", "flags"), CASES, ids=case_id)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=case_id)
def test_everything_active_is_torchs_own_step(optimizer_class, flags, implementation):
    net, plain = make_net(), plain_net()
    optimizer = optimizer_class(net.parameters(), lr=0.05, **flags, **implementation)
    expected = optimizer_class(plain.parameters(), lr=0.05, **flags, **implementation)
    attach(optimizer, net)
    for step in range(4):
        gradients(net, step), gradients(plain, step)
        optimizer.step(), expected.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("optimizer_class", "flags"), CASES, ids=case_id)
@pytest.mark.parametrize("implementation", [{}, {"fused": True}], ids=case_id)
@pytest.mark.usefixtures("kernels")
def test_everything_active_after_a_pause_of_one_step(optimizer_class, flags, implementation):
    """The full-parameter row path: "keep" without a step in between changes nothing."""
    net, plain = make_net(), plain_net()
    optimizer = optimizer_class(net.parameters(), lr=0.05, **flags, **implementation)
    expected = optimizer_class(plain.parameters(), lr=0.05, **flags, **implementation)
    attach(optimizer, net, "keep")
    for step in range(5):
        gradients(net, step), gradients(plain, step)
        if step == 2:  # a step that finds gradients for nobody, under a changed set
            for layer in layers(net).values():
                layer.channels.set([0])
            held = [p.grad for p in net.parameters()]
            optimizer.zero_grad()
            optimizer.step()
            for layer in layers(net).values():
                layer.channels.reset()
            for p, grad in zip(net.parameters(), held, strict=True):
                p.grad = grad
            gradients(net, step)
        optimizer.step(), expected.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def run_against_neurons(
    optimizer_class, flags, frozen_state, channels_last, seed, partial_from_the_start=False
):
    net = make_net(channels_last=channels_last)
    optimizer = optimizer_class(net.parameters(), lr=0.05, **flags)
    attach(optimizer, net, frozen_state)
    oracle = NeuronwiseOptimizer(lambda ps: optimizer_class(ps, lr=0.05, **flags), frozen_state)
    owned = {name: p for name, p in net.named_parameters() if name in owner_masks(net)}
    for name, p in owned.items():
        oracle.add(name, p, TRANSPOSED.get(name))
    generator = torch.Generator().manual_seed(seed)
    for step in range(6):
        if step > 0 or partial_from_the_start:
            random_masks(net, generator)
        grads = set_gradients(net, generator)
        masks = owner_masks(net)
        before = {name: frozen_rows(name, masks[name], p) for name, p in owned.items()}
        optimizer.step()
        oracle.step(grads, masks)
        for name, p in owned.items():
            after = frozen_rows(name, masks[name], p)
            assert all(map(torch.equal, before[name], after)), f"{name} moved while frozen"
        torch.testing.assert_close(
            {name: p.detach() for name, p in owned.items()},
            {name: oracle.value(name) for name in owned},
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("frozen_state", ["reset", "keep", "reference"])
@pytest.mark.parametrize(("optimizer_class", "flags"), CASES, ids=case_id)
@pytest.mark.usefixtures("kernels")
def test_sets_changing_at_every_step(optimizer_class, flags, frozen_state):
    run_against_neurons(optimizer_class, flags, frozen_state, channels_last=False, seed=1)


@pytest.mark.usefixtures("kernels")
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.sampled_from(CASES),
    implementation=st.sampled_from(IMPLEMENTATIONS),
    frozen_state=st.sampled_from(["reset", "keep", "reference"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 10_000),
    partial=st.booleans(),
)
def test_any_flags_layout_and_sets(
    case, implementation, frozen_state, channels_last, seed, partial
):
    optimizer_class, flags = case
    flags = {**flags, **implementation}
    run_against_neurons(optimizer_class, flags, frozen_state, channels_last, seed, partial)


def test_a_first_step_of_some_neurons_is_not_dampened():
    flags = {"momentum": 0.9, "dampening": 0.3}
    for frozen_state in ("reset", "keep", "reference"):
        run_against_neurons(SGD, flags, frozen_state, False, 3, partial_from_the_start=True)


def shifted(order, n):
    return order.roll(1), n


def one_too_many(order, n):
    return order, min(n + 1, len(order))


def one_too_few(order, n):
    return order, n - 1


@pytest.mark.parametrize("bug", [shifted, one_too_many, one_too_few])
@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
def test_a_step_of_the_wrong_neurons_is_caught(monkeypatch, optimizer_class, bug):
    name = "sgd_rows_" if optimizer_class is SGD else "adam_rows_"
    right = getattr(reference, name)

    def wrong(*args, **flags):
        *tensors, order, n, layout = args
        right(*tensors, *bug(order, n), layout, **flags)

    use_kernels(monkeypatch, "torch")
    monkeypatch.setattr(reference, name, wrong)
    with pytest.raises(AssertionError):
        run_against_neurons(optimizer_class, {}, "reset", channels_last=False, seed=1)


def test_a_step_count_shared_by_all_neurons_is_caught(monkeypatch):
    def shared(*args, **flags):
        *tensors, counts, order, n, layout = args
        right(*tensors, counts.fill_(int(counts.max())), order, n, layout, **flags)

    right = reference.adam_rows_
    use_kernels(monkeypatch, "torch")
    monkeypatch.setattr(reference, "adam_rows_", shared)
    with pytest.raises(AssertionError):
        run_against_neurons(Adam, {}, "reset", channels_last=False, seed=1)


def test_a_forgotten_reset_is_caught(monkeypatch):
    monkeypatch.setattr(row_steps.AdamRows, "reset", ("exp_avg", "max_exp_avg_sq"))
    with pytest.raises(AssertionError):
        run_against_neurons(Adam, {}, "reset", channels_last=False, seed=1)
