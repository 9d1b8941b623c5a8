"""How certain a median of ratios is, and rounds until it is certain enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neq_kernels.measure.timing import PHASES, StepTime, StepTimes

CONFIDENCE = 0.95
# Wider than this share of the median, an interval is measured again.
WIDEST = 0.06
# A try has at most so many times the rounds that it begins with.
MORE_ROUNDS = 3


@dataclass(frozen=True)
class Interval:
    """Of a median, with at least 95 % confidence, whatever the samples' distribution."""

    low: float
    median: float
    high: float

    @property
    def width(self) -> float:
        """As a share of the median."""
        return (self.high - self.low) / self.median


def median_interval(samples: Sequence[float]) -> Interval | None:
    """Between two order statistics (Conover, Practical Nonparametric Statistics, 3.2); None for
    fewer than six samples, whose smallest and largest are not far enough apart."""
    ordered, n = sorted(samples), len(samples)
    rank, tail = -1, 0.0  # tail: the chance that at most ``rank`` samples lie below the median
    while tail + math.comb(n, rank + 1) / 2**n <= (1 - CONFIDENCE) / 2:
        rank += 1
        tail += math.comb(n, rank) / 2**n
    if rank < 0:
        return None
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Interval(ordered[rank], median, ordered[n - 1 - rank])


@dataclass(frozen=True)
class Certain:
    """What was measured, in how many tries, and whether its interval is still too wide."""

    times: StepTimes
    tries: int
    wide: bool


def until_certain(
    measure: Callable[[int], StepTimes],
    ratios: Callable[[StepTimes], Sequence[float]],
    rounds: int,
    again: bool = True,
) -> Certain:
    """If ``again``, a wide interval gets more rounds, as many again at a time, then a second try
    from the start; of the two the narrower one counts, whatever its median."""

    def width(times: StepTimes) -> float:
        interval = median_interval(ratios(times))
        return math.inf if interval is None else interval.width

    def one_try() -> StepTimes:
        times = measure(rounds)
        for _ in range(MORE_ROUNDS - 1 if again else 0):
            if width(times) <= WIDEST:
                break
            times = together(times, measure(rounds))
        return times

    tries = [one_try()]
    if again and width(tries[0]) > WIDEST:
        tries.append(one_try())
    counted = min(tries, key=width)
    return Certain(counted, len(tries), wide=width(counted) > WIDEST)


def together(first: StepTimes, second: StepTimes) -> StepTimes:
    """The rounds of both."""
    return StepTimes(
        tuple(
            StepTime(
                a.name, *(getattr(a, phase) + getattr(second[a.name], phase) for phase in PHASES)
            )
            for a in first.variants
        ),
        first.machine,
    )
