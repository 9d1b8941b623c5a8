"""Cold times on a device whose clock is told what everything takes."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.common.deadline import Deadline
from neq_kernels.dispatch.stopwatch import WARMUP, cold_times
from tests.support.fake_gpu import FakeClock

SECONDS = {"a": 2e-3, "b": 3e-3, "c": 5e-3}
UNRECORDED = WARMUP + 1


def measured(seconds=0.2, **options):
    clock = FakeClock()
    calls = {name: lambda n=name: clock.work(n, SECONDS[n]) for name in SECONDS}
    return cold_times(calls, clock, seconds, **options), clock


def test_each_call_has_its_own_time_and_finds_the_cache_cold():
    samples, clock = measured()
    for name, seconds in SECONDS.items():
        assert samples[name] == pytest.approx([seconds] * len(samples[name]))
    assert clock.log[::2] == ["flush"] * (len(clock.log) // 2)
    assert "flush" not in clock.log[1::2]


def test_every_round_has_every_call_once_in_changing_orders():
    samples, clock = measured(seconds=1.0)
    calls = clock.log[1::2]
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(each) == list(SECONDS) for each in rounds)
    assert len(rounds) == len(samples["a"]) + UNRECORDED
    firsts = Counter(each[0] for each in rounds)
    assert set(firsts) == set(SECONDS)
    assert max(firsts.values()) < 0.7 * len(rounds)


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, 5), (0.0131 * 10, 10), (60.0, 20)])
def test_as_many_rounds_as_fit(seconds, rounds):
    samples, _ = measured(seconds, least_rounds=5, most_rounds=20)
    assert {len(each) for each in samples.values()} == {rounds}


def test_what_compiles_at_first_is_not_in_the_samples():
    clock = FakeClock()
    seen = []

    def compiles() -> None:
        clock.work("slow", 5.0 if len(seen) < WARMUP else 1e-3)
        seen.append(None)

    samples = cold_times({"slow": compiles}, clock, 0.01, least_rounds=3)
    assert samples["slow"] == pytest.approx([1e-3] * len(samples["slow"]))
    assert len(samples["slow"]) == 5  # the round of 5 s did not count as one that fits


def test_no_calls_are_refused():
    with pytest.raises(ValueError, match="calls: expected at least one"):
        cold_times({}, FakeClock(), 1.0)


def test_a_deadline_is_split_and_what_is_left_goes_on():
    now = [100.0]
    whole = Deadline.after(60.0, lambda: now[0])
    shares = {"a": 3, "b": 2, "c": 1}
    assert whole.part("a", shares).left == pytest.approx(30)
    now[0] += 10  # a took less than it might have
    del shares["a"]
    assert whole.part("b", shares).left == pytest.approx(50 * 2 / 3)
    now[0] += 49
    assert not whole.passed
    assert whole.part("c", {"c": 1}).left == pytest.approx(1)
    now[0] += 2
    assert whole.passed
    assert whole.left == 0
