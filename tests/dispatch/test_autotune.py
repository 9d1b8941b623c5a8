"""Measuring: every candidate runs, on the clock that is given, and the wrong is passed over."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.aten import Aten
from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.dispatch import autotune, stopwatch, trial, tuning_table
from neq_kernels.dispatch.selection import selector
from tests.support.tuning_problems import CONV, LINEAR, PACK

pytestmark = pytest.mark.usefixtures("own_folder")


def test_measuring_on_the_fly_is_asked_for_by_the_environment(monkeypatch):
    measured = []
    monkeypatch.setattr(
        autotune, "fastest", lambda problem, n, *_: measured.append((problem, n)) or PACK
    )
    place = selector.context("cpu")
    selector.choice(LINEAR, 3, place)
    assert measured == []
    selector.forget_choices()
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "1")
    for _ in range(3):
        assert selector.choice(LINEAR, 3, place) == PACK
    assert measured == [(LINEAR, 3)]
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "yes")
    selector.forget_choices()
    with pytest.raises(ValueError, match="expected never, doubt or always, got 'yes'"):
        selector.choice(LINEAR, 5, place)


@pytest.mark.parametrize("problem", [CONV, LINEAR])
def test_the_contest_runs_every_candidate(problem):
    ran = []

    class Counted(Aten):
        def conv_backward(self, *tensors, choice, **more):
            ran.append(choice.strategy)
            return super().conv_backward(*tensors, choice=PACK, **more)

        def linear_backward(self, *tensors, choice, **more):
            ran.append(choice.strategy)
            return super().linear_backward(*tensors, choice=PACK, **more)

    candidates = {KernelChoice(strategy): Counted() for strategy in Strategy}
    assert autotune.fastest(problem, 4, candidates, seconds=0.001) in candidates
    assert set(ran) == set(Strategy)


class WithSettings:
    """A backend whose kernel runs four ways: the second cannot be launched, the last one, which
    would be fastest, is wrong."""

    ways = tuple(KernelChoice(Strategy.CUSTOM, (number,)) for number in (1, 2, 3, 4))

    def __init__(self, clock):
        self._clock = clock

    def linear_backward(self, *tensors, choice, **more):
        settings = choice.settings
        if settings == (2,):
            raise RuntimeError("out of shared memory")
        self._clock.now += {(): 5.0, (1,): 3.0, (3,): 1.0, (4,): 0.5}[settings]
        gradient = torch.arange(1.0, 9.0)
        return (None, gradient if settings != (4,) else gradient.roll(1), None)


class FakeClock:
    """Stands still but for what calls add."""

    def __init__(self):
        self.now, self.flushed = 0.0, 0

    def flush(self):
        self.flushed += 1

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        pass


def test_on_a_gpu_ways_compete_on_a_clock_and_the_wrong_is_passed_over(monkeypatch, caplog):
    clock = FakeClock()
    backend = WithSettings(clock)
    candidates = dict.fromkeys([KernelChoice(Strategy.DENSE), *WithSettings.ways], backend)
    monkeypatch.setattr(autotune, "operands", lambda problem, device: [torch.zeros(2, 2)] * 3)
    monkeypatch.setattr(trial.ActiveChannels, "on", lambda self, device: None)
    winner = autotune.fastest(LINEAR, 4, candidates, "cuda", 0.1, clock)
    assert winner == KernelChoice(Strategy.CUSTOM, (3,))
    assert clock.flushed > 0
    assert "out of shared memory" in caplog.text
    assert "(4,)" in caplog.text
    assert "its gradient is off by 7.00e+00" in caplog.text


def test_every_round_of_a_contest_has_an_order_of_its_own():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = stopwatch.in_turns(calls, seconds=60, most_rounds=40)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 40)
    orders = ["".join(seen[i : i + 3]) for i in range(3, 123, 3)]
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders)) == 6
