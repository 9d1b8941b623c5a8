"""Runs the tests of ``tests/backends/triton`` without a GPU, under two executors, and on a GPU
where there is one.

Triton's interpreter computes with numpy what the source says; the sanitizer executes the IR that
Triton compiles, and reports accesses out of bounds and races between programs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.backends import triton

FOLDER = Path(__file__).parent / "triton"
EXECUTORS = {
    "interpreter": ["-m", "pytest"],
    "sanitizer": ["-m", "ttsem.sanitize", "pytest"],
}
if torch.cuda.is_available():
    EXECUTORS["cuda"] = ["-m", "pytest"]


def run(executor: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, where the kernels are executed by ``executor``."""
    told = {"NEQ_TRITON_EXECUTOR": executor, "NEQ_KERNELS_BACKEND": "triton", **environment}
    if executor == "interpreter":
        told["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *EXECUTORS[executor], "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, **told},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("test_*.py")))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_kernels(executor, module):
    result = run(executor, str(FOLDER / f"{module}.py"))
    summary = result.stdout.splitlines()[-1]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert re.fullmatch(r"\d+ passed.*", summary.strip("= ")), summary
    assert "skipped" not in summary


def test_without_a_gpu_the_reason_is_given():
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        assert triton.unavailable() == "PyTorch finds no GPU"
