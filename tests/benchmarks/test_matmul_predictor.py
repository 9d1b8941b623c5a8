"""The process that asks NVIDIA's package."""

from __future__ import annotations

import sys
from dataclasses import astuple

import pytest

import benchmarks.matmul_predictor as matmul
from benchmarks.matmul_predictor import Gemm, Kernel
from benchmarks.predicted_step import GPUS


def test_predictor_that_fails_or_knows_nothing(monkeypatch):
    monkeypatch.setattr(matmul, "unavailable", lambda: None)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        matmul.ask("H100_SXM", "fp8", [])

    def answering(stdout, returncode=0, stderr=""):
        done = matmul.subprocess.CompletedProcess([], returncode, stdout, stderr)
        monkeypatch.setattr(matmul.subprocess, "run", lambda *_, **__: done)

    gemm = Gemm(1, 2, 3)
    answering("[[[1, 2, 3, 4]]]")
    assert matmul.ask("H100_SXM", "bf16", [gemm, gemm]) == {gemm: (Kernel(1, 2, 3, 4),)}
    for nothing in ("[[]]", "[[[0, 0, 0, 0]]]"):
        answering(nothing)
        with pytest.raises(RuntimeError, match="expected a time"):
            matmul.ask("H100_SXM", "bf16", [gemm])
    answering("", -11, "first\nlast")
    with pytest.raises(RuntimeError, match="exit status -11, it said: last"):
        matmul.ask("H100_SXM", "bf16", [gemm])


@pytest.mark.skipif(sys.platform != "linux", reason="the package exists for Linux only")
def test_real_predictions():
    """Small: one query, in a process that would crash if it ended as others do."""
    rows = (4096, 1024, 410, 41)
    gemms = [Gemm(m, 4096, 16384) for m in rows] + [Gemm(16, 4096, 16384, "TRITON")]
    answers = {gpu.name: matmul.ask(gpu.name, "bf16", gemms) for gpu in GPUS.values()}

    def seconds(gpu, gemm):
        return min(max(k.compute, k.load) + k.store + k.latency for k in answers[gpu][gemm])

    for gpu in GPUS.values():
        times = [seconds(gpu.name, gemm) for gemm in gemms[:4]]
        assert times == sorted(times, reverse=True)
        assert times[0] >= 2 * rows[0] * 4096 * 16384 / gpu.tensor_flops
        for m, each in zip(rows[1:], times[1:], strict=True):
            assert each > times[0] * m / rows[0]
        assert all(astuple(k)[3] > 0 for k in answers[gpu.name][gemms[4]])
    assert seconds("A100_SXM_80GB", gemms[0]) > 2 * seconds("H100_SXM", gemms[0])
