"""Run every check of this machine, in this process or in one of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor.cases import CASES
from neq_kernels.doctor.checks import ANY, OPS, Check, usable
from neq_kernels.doctor.gradients import check_gradients, check_similarity
from neq_kernels.doctor.row_steps import row_step_checks

logger = logging.getLogger(__name__)


def run_apart() -> Iterator[Check]:
    """:func:`run` in a process of its own, on the same GPU: a kernel that crashes is a failed
    check."""
    command = [sys.executable, "-m", "neq_kernels.doctor"]
    if torch.cuda.is_available():
        command.append(str(torch.cuda.current_device()))
    n = 0
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            saved = json.loads(line)
            n += 1
            yield Check(**saved | {"failures": tuple(saved["failures"])})
        code = process.wait()
        errors.seek(0)
        last_words = errors.read().strip().splitlines()[-1:]
    if code:
        reason = "; ".join([f"the process died (exit code {code})", *last_words])
        yield Check(f"check {n + 1}, the rest", ANY, ANY, 0, (reason,))


def prove(checks: Iterable[Check] | None = None) -> tuple[str, ...]:
    """The backends for GPUs that are right on this one; they are a default from now on, here and in
    later processes. Where a check could not be finished nothing is remembered.

    Args:
        checks: the outcome of :func:`run`; None runs them apart.
    """
    checks = list(run_apart() if checks is None else checks)
    for failed in (check for check in checks if not check.passed):
        logger.warning("%s of %s on %s is wrong: %s", *failed.about, failed.failures[0])
    if any(check.backend == ANY for check in checks):
        return ()
    on_gpu = [check for check in checks if check.device == "cuda"]
    right = tuple(
        name
        for name in selector.for_gpus()
        if {check.op for check in on_gpu if check.backend == name} == set(OPS)
        and all(check.passed for check in on_gpu if check.backend == name)
    )
    selector.verified.keep(right)
    selector.forget_backends()
    return right if selector.verified.names() is not None else ()


def run() -> Iterator[Check]:
    """Check every op on every backend that supports a device of this machine. Takes seconds;
    minutes where Triton compiles for the first time.

    Random state, the choice of backend and PyTorch's float32 precision are left as they were.
    """
    with torch.random.fork_rng(devices=[]), _full_precision():
        for backend, device in usable():
            with selector.forced_backend(backend):
                yield from (check_gradients(op, backend, device) for op in CASES)
                yield check_similarity(backend, device)
        yield from row_step_checks()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: whether PyTorch rounds to it depends on the kernel that it picks, and its error is
    the measure of ours."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
