"""Intervals of medians, and when a measurement is repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks.steps import certainty
from benchmarks.steps.certainty import median_interval, until_certain
from neq_kernels.measure.timing import StepTime, StepTimes


@pytest.mark.parametrize(
    ("n", "rank"),  # the largest rank by the binomial distribution, tables of the sign test
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (45, 16), (60, 22)],
)
def test_ranks_of_the_interval(n, rank):
    interval = median_interval([float(i) for i in range(n, 0, -1)])
    assert (interval.low, interval.median, interval.high) == (rank, (n + 1) / 2, n + 1 - rank)
    assert interval.width == pytest.approx((n + 1 - 2 * rank) / ((n + 1) / 2))


def test_too_few_samples_have_no_interval():
    assert median_interval([1.0] * 5) is None


def test_the_interval_holds_the_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [median_interval(random.exponential(size=15).tolist()) for _ in range(2000)]
    held = [i.low <= math.log(2) <= i.high for i in intervals]
    assert 0.95 <= np.mean(held) <= 0.98


@dataclass
class Machine:
    """Whose ratios spread by ``spreads``, one for each time that it is asked."""

    spreads: list[float]
    asked: list[int] = field(default_factory=list)

    def measure(self, rounds):
        self.asked.append(rounds)
        spread = self.spreads.pop(0)
        fast = tuple(1 + spread * (i % 2) for i in range(rounds))
        nothing = (0.0,) * rounds
        return StepTimes((StepTime("fast", fast, nothing, nothing),))


def ratios(times):
    return times["fast"].total


@pytest.mark.parametrize(
    ("spreads", "again", "asked", "tries", "wide", "rounds"),
    [
        ([0.01], True, [15], 1, False, 15),
        ([0.5], False, [15], 1, True, 15),
        ([0.5, 0.0], True, [15, 15], 1, False, 30),
        ([0.5, 0.5, 0.0], True, [15, 15, 15], 1, False, 45),
        ([0.5, 0.5, 0.5, 0.0], True, [15, 15, 15, 15], 2, False, 15),
        ([0.5, 0.5, 0.5, 0.4, 0.4, 0.4], True, [15] * 6, 2, True, 45),
    ],
)
def test_a_wide_interval_is_measured_again(spreads, again, asked, tries, wide, rounds):
    machine = Machine(list(spreads))
    found = until_certain(machine.measure, ratios, 15, again)
    assert machine.asked == asked
    assert (found.tries, found.wide) == (tries, wide)
    assert len(found.times["fast"].total) == rounds


def test_of_two_tries_the_narrower_counts_not_the_faster():
    machine = Machine([0.3] * 3 + [0.9] * 3)
    found = until_certain(machine.measure, ratios, 15)
    assert max(ratios(found.times)) == pytest.approx(1.3)
    assert found.wide


def test_rounds_of_two_measurements_stay_pairs():
    one = StepTimes((StepTime("a", (1.0,), (2.0,), (3.0,)), StepTime("b", (4.0,), (5.0,), (6.0,))))
    other = StepTimes(
        (StepTime("b", (7.0,), (8.0,), (9.0,)), StepTime("a", (10.0,), (11.0,), (12.0,)))
    )
    both = certainty.together(one, other)
    assert both["a"].backward == (2.0, 11.0)
    assert both["b"].optimizer == (6.0, 9.0)
