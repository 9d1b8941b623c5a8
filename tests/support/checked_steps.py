"""Steps of a small network under the whole-step check, with a clock that is told what they take."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import SGD

from neq_kernels.backends.problem import Strategy
from neq_kernels.conversion.convert import convert
from neq_kernels.dispatch import calibration, tuning_table
from neq_kernels.dispatch.selection import Selector, selector
from neq_kernels.optim import attach, step_check
from neq_kernels.optim.dense_serving import DenseServing

X = torch.linspace(-1, 1, 2 * 3 * 5 * 5, dtype=torch.float64).view(2, 3, 5, 5)


class FakeClock:
    """The steps of ``optimizer`` take ``seconds(is_dense)``, which is known ``delay`` questions
    later."""

    def __init__(self, net, optimizer, seconds, delay=0):
        self._channels, self._seconds, self._delay = net[0].channels, seconds, delay
        self._now, self._asked, self.marks = 0.0, 0, 0
        optimizer.register_step_pre_hook(self._work)

    def _work(self, optimizer, args, kwargs):
        self._now += self._seconds(self._channels.served_densely)

    def mark(self):
        self.marks += 1
        return self._now

    def seconds(self, start, end):
        self._asked += 1
        return None if self._asked <= self._delay else end - start


def slower(is_dense):
    return 0.9 if is_dense else 1.0


def faster(is_dense):
    return 1.1 if is_dense else 1.0


def noisy():
    durations = random.Random(0)
    return lambda is_dense: durations.choice([0.5, 0.8, 1.0, 1.4, 2.0])


@contextmanager
def asked_for(monkeypatch) -> Iterator[None]:
    """Within it the check is asked for, and the chosen kernels pack."""
    monkeypatch.setenv(step_check.VARIABLE, "1")
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "")
    monkeypatch.setattr(DenseServing, "_every", WeakSet())  # those of other tests may live on
    monkeypatch.setattr(DenseServing, "_loaded", frozenset())
    monkeypatch.setenv(calibration.SWITCH, "0")
    with selector.forced_strategy(Strategy.PACK):
        yield
    selector.forget()  # what was loaded


def recorded_strategies(monkeypatch):
    """The strategies of all weight gradients computed from now on, in a list that grows."""
    used, backend_of = [], Selector.backend_of

    def recorded(self, choice, context):
        used.append(choice.strategy)
        return backend_of(self, choice, context)

    monkeypatch.setattr(Selector, "backend_of", recorded)
    return used


def make_net():
    torch.manual_seed(0)
    net = convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6)
        )
    ).double()
    net[0].channels.set([0, 2, 3, 7])
    net[4].channels.set([1, 5])
    return net


def make(monkeypatch, seconds=slower, delay=0, make_optimizer=SGD):
    net = make_net()
    optimizer = make_optimizer(net.parameters(), lr=0.001)
    clock = FakeClock(net, optimizer, seconds, delay)
    monkeypatch.setattr(step_check, "clock_of", lambda device: clock)
    return net, optimizer, attach(optimizer, net)


def step(net, optimizer, x=X):
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def train(net, optimizer, steps):
    for _ in range(steps):
        step(net, optimizer)


def until_verdict(net, optimizer, most=200):
    for steps in range(1, most):
        step(net, optimizer)
        if is_dense(net) and not hooks(net):
            return steps
    raise AssertionError("no verdict")


def logged(caplog):
    return [record for record in caplog.records if record.name == step_check.logger.name]


def hooks(net):
    return [hook for m in net.modules() for hook in m._forward_pre_hooks.values()]


def is_dense(net):
    served = {layer.channels.served_densely for layer in (net[0], net[1], net[4])}
    assert len(served) == 1, "layers of one model are served in different ways"
    return served.pop()
