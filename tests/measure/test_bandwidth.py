from __future__ import annotations

import pytest
from torch.utils import benchmark

from neq_kernels.measure import bandwidth


@pytest.mark.parametrize("measured", [bandwidth.read_bandwidth, bandwidth.write_bandwidth])
def test_bandwidth_is_that_of_the_fastest_trial(monkeypatch, measured):
    seconds = iter([0.5, 0.25, 1.0])

    class Timer:
        def __init__(self, statement, *, globals, num_threads):
            assert globals["buffer"].nbytes == bandwidth.BUFFER_BYTES

        def timeit(self, number):
            assert number == 1
            return type("Measurement", (), {"mean": next(seconds)})

    monkeypatch.setattr(benchmark, "Timer", Timer)
    monkeypatch.setattr(bandwidth, "TRIALS", 3)
    assert measured() == bandwidth.BUFFER_BYTES / 0.25
