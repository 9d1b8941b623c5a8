"""The self-check of ``neq doctor``: it passes, and it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys

import pytest
import torch

from neq_kernels.dispatch import selection
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import runner
from neq_kernels.optim import reference
from tests.support.backends import aten, triton


def results() -> dict[tuple[str, str], doctor_checks.Check]:
    return {(check.op, check.backend): check for check in runner.run()}


def test_every_op_of_every_backend_passes_and_nothing_is_left_behind(monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "aten")
    random = torch.get_rng_state()
    checks = results()
    assert [f for check in checks.values() for f in check.failures] == []
    usable = [
        n for n, reason in selector.availability() if reason is None and n != doctor_checks.ORACLE
    ]
    for backend in usable:
        for op in ("linear_backward", "conv_backward", "channel_similarity"):
            assert checks[op, backend].cases > 0
    for op in ("SGD", "Adam", "AdamW"):
        assert checks[f"{op} row step", "torch"].cases > 0
    assert os.environ[selection.ENVIRONMENT_VARIABLE] == "aten"
    assert torch.equal(torch.get_rng_state(), random)


def test_triton_is_checked_on_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(doctor_checks, "device_types", lambda: ["cpu", "cuda"])
    served = list(doctor_checks.usable())
    assert {device for backend, device in served if backend == "triton"} == {"cuda"}
    assert {device for backend, device in served if backend == "aten"} == {"cpu", "cuda"}


def test_float32_is_not_rounded_to_tf32_while_it_is_checked(monkeypatch, only_aten):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    seen = []
    correct = aten.linear_backward

    def watched(*args, **kwargs):
        seen.extend(setting.fp32_precision for setting in settings)
        return correct(*args, **kwargs)

    monkeypatch.setattr(aten, "linear_backward", watched)
    results()
    assert set(seen) == {"ieee"}
    assert [setting.fp32_precision for setting in settings] == before


@pytest.fixture
def only_aten(monkeypatch):
    monkeypatch.setattr(doctor_checks, "usable", lambda: iter([("aten", "cpu")]))


def test_a_gradient_in_the_wrong_row_is_found(monkeypatch, only_aten):
    correct = aten.scatter_rows

    def off_by_one(grad_rows, like, order, n, layout):
        return correct(grad_rows, like, order.roll(1), n, layout)

    monkeypatch.setattr(aten, "scatter_rows", off_by_one)
    checks = results()
    for op in ("linear_backward", "conv_backward"):
        assert any("weight gradient" in f for f in checks[op, "aten"].failures)
        assert not any("active: all" in f for f in checks[op, "aten"].failures)
    assert checks["channel_similarity", "aten"].passed


def test_a_kernel_that_raises_or_leaves_nan_is_found(monkeypatch, only_aten):
    def raises(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(aten, "pack", raises)
    monkeypatch.setattr(
        aten, "channel_similarity", lambda a, b, dim: torch.full((3, a.shape[dim]), torch.nan)
    )
    checks = results()
    assert any("RuntimeError: planted" in f for f in checks["conv_backward", "aten"].failures)
    assert not checks["channel_similarity", "aten"].passed


def test_a_row_step_that_moves_a_frozen_row_is_found(monkeypatch, only_aten):
    correct = reference.sgd_rows_

    def careless(param, *arguments, **options):
        correct(param, *arguments, **options)
        param.mul_(1 + 1e-15)

    monkeypatch.setattr(reference, "sgd_rows_", careless)
    checks = results()
    assert any("frozen rows moved" in f for f in checks["SGD row step", "torch"].failures)
    assert checks["Adam row step", "torch"].passed


def test_what_a_process_complains_of_does_not_hold_it_up(monkeypatch, tmp_path):
    """More than a pipe takes."""
    python = tmp_path / "python"
    line = json.dumps(
        dataclasses.asdict(doctor_checks.Check("linear_backward", "cpu", "cpu", 3, ()))
    )
    python.write_text(f"#!/bin/sh\nhead -c 300000 /dev/zero >&2\necho '{line}'\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    (check,) = runner.run_apart()
    assert check.passed


def test_a_process_that_dies_is_a_failed_check(monkeypatch, tmp_path):
    python = tmp_path / "python"
    line = json.dumps(
        dataclasses.asdict(doctor_checks.Check("linear_backward", "cpu", "cpu", 3, ()))
    )
    says = f"echo '{line}'; echo 'free(): invalid pointer' >&2"
    python.write_text(f"#!/bin/sh\n{says}\nkill -ABRT $$\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    first, last = runner.run_apart()
    assert first.passed
    assert first.cases == 3
    assert last.failures == ("the process died (exit code -6); free(): invalid pointer",)
