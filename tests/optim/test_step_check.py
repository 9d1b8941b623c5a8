"""The whole-step check. No time is measured here: the clock is told what a step takes."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import random

import pytest
import torch
from torch.optim import SGD, RMSprop

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch import tuning_table
from neq_kernels.dispatch.contests import Contests
from neq_kernels.dispatch.selection import selector
from neq_kernels.optim import attach, is_attached, step_check
from neq_kernels.optim.step_check import EventClock, StepCheck, interval_of_median
from tests.support.checked_steps import (
    FakeClock,
    X,
    faster,
    hooks,
    is_dense,
    logged,
    make,
    make_net,
    noisy,
    slower,
    step,
    train,
    until_verdict,
)

pytestmark = pytest.mark.usefixtures("step_check_asked_for")


def used_by_a_step(strategies, net):
    """Of the linear layer and the convolution, planned and not."""
    found = []
    for autocast in (False, True):
        strategies.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = net.float()(X.float()).float().square().sum()
        loss.backward()
        found.append(set(strategies))
    planned, unplanned = found
    assert planned == unplanned
    return planned


@pytest.mark.usefixtures("hasty")
@pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")
@pytest.mark.parametrize("make_optimizer", [SGD, RMSprop])
def test_where_dense_steps_are_shorter_dense_kernels_serve_until_the_masks_change(
    monkeypatch, caplog, strategies, make_optimizer
):
    net, optimizer, attached = make(monkeypatch, make_optimizer=make_optimizer)
    assert used_by_a_step(strategies, net) == {Strategy.PACK}
    net.double()
    until_verdict(net, optimizer)
    (record,) = logged(caplog)
    assert record.levelno == logging.WARNING
    assert "takes 0.900 of its time (95 % interval 0.900 to 0.900, 8 comp" in record.getMessage()
    assert is_dense(net)
    assert not hooks(net)
    train(net, optimizer, 30)
    assert attached._check.dense_steps == 9  # one to warm up
    assert used_by_a_step(strategies, net) == {Strategy.DENSE}
    net[4].channels.set([1])  # the convolution's mask is the same
    assert not is_dense(net)
    assert "dense" not in neq.tuning_state_dict()
    assert used_by_a_step(strategies, net) == {Strategy.PACK}
    assert len(logged(caplog)) == 1


@pytest.mark.usefixtures("hasty")
def test_frozen_rows_are_zeros_while_dense_kernels_serve(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    until_verdict(net, optimizer)
    step(net, optimizer)
    for layer in (net[0], net[4]):
        assert (layer.weight.grad.flatten(1) != 0).any(1).nonzero().flatten().tolist() == (
            layer.channels.active.tolist()
        )


@pytest.mark.usefixtures("hasty")
def test_a_stopped_prefix_stays_stopped(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    for layer in (net[0], net[1]):
        layer.channels.set([])
    until_verdict(net, optimizer)
    step(net, optimizer)
    assert net[0].weight.grad is None
    assert not net[:3](X).requires_grad


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("seconds", "dense_steps"), [(faster, 9), (noisy(), 17), (lambda is_dense: 1.0, 9)]
)
def test_where_they_are_not_nothing_changes(monkeypatch, caplog, seconds, dense_steps):
    net, optimizer, attached = make(monkeypatch, seconds)
    train(net, optimizer, 100)
    assert attached._check.dense_steps == dense_steps
    assert not is_dense(net)
    assert not hooks(net)
    assert not logged(caplog)


@pytest.mark.usefixtures("hasty")
def test_a_drift_is_no_difference(monkeypatch):
    durations = (0.9**i for i in itertools.count())
    net, optimizer, _ = make(monkeypatch, lambda is_dense: next(durations))
    train(net, optimizer, 100)
    assert not is_dense(net)


@pytest.mark.usefixtures("hasty")
def test_each_set_of_masks_is_checked(monkeypatch):
    net, optimizer, attached = make(monkeypatch, faster)
    for change in range(3):
        net[0].channels.set([change])
        train(net, optimizer, 250)
        assert attached._check.dense_steps == 9 * (change + 1)


def test_at_most_one_step_in_a_hundred_is_a_dense_one(monkeypatch):
    net, optimizer, attached = make(monkeypatch, noisy())
    for i in range(1, 1210):
        step(net, optimizer)
        assert attached._check.dense_steps <= 0.01 * i
        if i == 700:
            net[0].channels.set([0])
    assert attached._check.dense_steps == 12


@pytest.mark.usefixtures("hasty")
def test_times_of_a_gpu_are_read_when_they_are_known(monkeypatch):
    net, optimizer, _ = make(monkeypatch, delay=100)
    steps_with_delay = until_verdict(net, optimizer)
    net, optimizer, _ = make(monkeypatch)
    assert steps_with_delay > until_verdict(net, optimizer) + 30


def test_events_are_not_waited_for(monkeypatch):
    class Event:
        is_done = False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

        def query(self):
            return self.is_done

        def elapsed_time(self, end):
            assert self.is_done
            assert end.is_done
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = EventClock(torch.device("cuda", 1))
    start, end = clock.mark(), clock.mark()
    assert start.stream == "stream of cuda:1"
    assert clock.seconds(start, end) is None
    end.is_done = True
    assert clock.seconds(start, end) is None
    start.is_done = True
    assert clock.seconds(start, end) == 1.5
    end.is_done = False
    assert clock.seconds(start, end) is None


@pytest.mark.usefixtures("hasty")
def test_a_step_begins_with_its_first_forward(monkeypatch):
    net, optimizer, _ = make(monkeypatch, faster)
    clock = step_check.clock_of(None)
    while not hooks(net):
        step(net, optimizer)
    with torch.no_grad():
        net(X)
    assert clock.marks == 0  # an evaluation belongs to no step
    for _ in range(3):
        net(X).sum().backward()
    assert clock.marks == 1
    optimizer.step()
    assert clock.marks == 2


# --- where it is off -----------------------------------------------------------------------------


def no_reason(monkeypatch, net, optimizer):
    pass


def process_group(monkeypatch, net, optimizer):
    monkeypatch.setattr(step_check, "in_process_group", lambda: True)


def other_optimizer(monkeypatch, net, optimizer):
    net.other = SGD(net.parameters(), lr=0.1)  # kept alive
    attach(net.other, net)


def deterministic(monkeypatch, net, optimizer):
    torch.use_deterministic_algorithms(True, warn_only=True)


def never(monkeypatch, net, optimizer):
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "never")


def never_by_number(monkeypatch, net, optimizer):
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "0")


def loaded_table(monkeypatch, net, optimizer):
    neq.load_tuning_state_dict(neq.tuning_state_dict())


def capture(monkeypatch, net, optimizer):
    monkeypatch.setattr(selector.rehearsal, "captures", lambda tensor: True)


def unknown_device(monkeypatch, net, optimizer):
    monkeypatch.setattr(StepCheck, "_device", lambda self: torch.device("mps"))


OFF = [
    process_group,
    other_optimizer,
    deterministic,
    never,
    never_by_number,
    loaded_table,
    capture,
    unknown_device,
]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("reason", [no_reason, *OFF])
def test_it_is_off(monkeypatch, reason):
    net, optimizer, attached = make(monkeypatch)
    reason(monkeypatch, net, optimizer)
    train(net, optimizer, 60)
    assert is_dense(net) == (reason is no_reason)
    assert attached._check.dense_steps == (9 if reason is no_reason else 0)
    assert not hooks(net)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("reason", [no_reason, *OFF])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_it_goes_off_in_the_midst_of_a_trial(monkeypatch, reason, steps):
    net, optimizer, attached = make(monkeypatch)
    while not hooks(net):
        step(net, optimizer)
    train(net, optimizer, steps)
    reason(monkeypatch, net, optimizer)
    train(net, optimizer, 60)
    assert is_dense(net) == (reason is no_reason)
    assert attached._check.dense_steps == (9 if reason is no_reason else min(steps, 1))
    assert not hooks(net)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("period", "is_checked"), [(150, False), (250, True)])
def test_it_is_off_where_masks_change_often(monkeypatch, period, is_checked):
    net, optimizer, attached = make(monkeypatch, faster)
    train(net, optimizer, period)
    net[0].channels.set([0])
    train(net, optimizer, period)
    before = attached._check.dense_steps
    for i in range(2, 4):
        net[0].channels.set([i])
        train(net, optimizer, period)
    assert (attached._check.dense_steps > before) == is_checked
    train(net, optimizer, 200)  # they may have stopped changing
    assert attached._check.dense_steps > before


@pytest.mark.usefixtures("hasty")
def test_how_often_masks_change_is_a_running_mean(monkeypatch):
    net, optimizer, attached = make(monkeypatch, faster)
    checks = []
    for i, steps in enumerate((100, 400, 150, 100, 150)):  # means: 100, 250, 200, 150
        before = attached._check.dense_steps
        train(net, optimizer, steps)
        checks.append(attached._check.dense_steps > before)
        net[0].channels.set([i])
    assert checks == [True, True, True, True, False]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("open_for", "begins_at"), [(0, 6), (30, 30), (500, 201)])
def test_it_waits_for_contests_of_kernels_but_not_for_ever(monkeypatch, open_for, begins_at):
    net, optimizer, _ = make(monkeypatch)
    steps = 0
    monkeypatch.setattr(Contests, "__len__", lambda self: steps < open_for)
    while not hooks(net):
        steps += 1
        step(net, optimizer)
    assert steps == begins_at


@pytest.mark.usefixtures("hasty")
def test_the_reason_is_logged_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, step_check.logger.name)
    net, optimizer, _ = make(monkeypatch)
    deterministic(monkeypatch, net, optimizer)
    train(net, optimizer, 60)
    assert [r.getMessage() for r in logged(caplog)] == [
        "step check: off where nothing is measured: with deterministic algorithms, "
        "NEQ_KERNELS_TUNE=never or a loaded table"
    ]


@pytest.mark.parametrize("value", ["yes", "2", "true"])
def test_a_bad_value_is_refused(monkeypatch, value):
    monkeypatch.setenv(step_check.VARIABLE, value)
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=f"NEQ_KERNELS_STEP_CHECK: expected 0 or 1, got '{value}'"):
        attach(optimizer, net)
    assert not is_attached(net)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("value", ["", "0"])
def test_it_is_opt_in(monkeypatch, value):
    monkeypatch.setenv(step_check.VARIABLE, value)
    net, optimizer, attached = make(monkeypatch)
    assert attached._check is None
    train(net, optimizer, 60)
    assert not is_dense(net)


# --- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
def test_weights_are_those_of_a_run_without_it(monkeypatch):
    nets = []
    for value in ("1", "0"):
        monkeypatch.setenv(step_check.VARIABLE, value)
        net, optimizer, attached = make(monkeypatch)
        start = copy.deepcopy(net.state_dict())
        train(net, optimizer, 60)
        assert (attached._check is not None) == is_dense(net) == (value == "1")
        nets.append(net)
    checked, unchecked = nets
    for name, expected in unchecked.state_dict().items():
        actual = checked.state_dict()[name]
        if expected.is_floating_point():
            assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max(), name
        frozen = {"0.weight": net[0], "4.weight": net[4]}.get(name)
        if frozen is not None:
            rows = frozen.channels.frozen
            assert torch.equal(actual[rows], start[name][rows])


@pytest.mark.usefixtures("hasty")
def test_other_models_keep_their_kernels(monkeypatch):
    net, optimizer, _ = make(monkeypatch)
    other, other_optimizer, other_attached = make(monkeypatch, faster)
    clocks = {
        False: FakeClock(net, optimizer, slower),
        True: FakeClock(other, other_optimizer, faster),
    }
    for _ in range(100):
        for which, steps in ((False, (net, optimizer)), (True, (other, other_optimizer))):
            monkeypatch.setattr(step_check, "clock_of", lambda device, w=which: clocks[w])
            step(*steps)
    assert is_dense(net)
    assert not is_dense(other)
    assert other_attached._check.dense_steps == 9


# --- the interval --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "places"), [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (16, (4, 13))])
def test_interval_of_median(n, places):
    samples = list(range(1, n + 1))
    random.Random(0).shuffle(samples)
    assert interval_of_median(samples) == places
    # How often fewer than k of n samples lie below the median, and how often above.
    missed = 2 * sum(math.comb(n, i) for i in range(places[0])) / 2**n
    assert missed <= 0.05 < missed + 2 * math.comb(n, places[0]) / 2**n


def test_no_interval_of_five():
    with pytest.raises(ValueError, match="samples: expected at least 6, got 5"):
        interval_of_median([1.0] * 5)
