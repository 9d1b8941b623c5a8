"""Whether the kernels are right on this GPU: the tests that run on one, and ``neq doctor``'s."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import processes
from benchmarks.common.deadline import Deadline
from benchmarks.common.files import ROOT
from benchmarks.common.processes import Ended, Job
from benchmarks.common.records import Row
from neq_kernels.dispatch.selection import ENVIRONMENT_VARIABLE

FOLDER = "tests/backends/triton"
OF_CUDA = ("tests/backends/cuda/test_backend.py", "tests/backends/cuda/test_training.py")
# The other tests there call Triton's kernels by name.
OF_ANY_BACKEND = (
    f"{FOLDER}/test_capture.py",
    f"{FOLDER}/test_training.py::test_training_equals_the_dense_one_with_its_frozen_rows_put_back",
)
PACKAGES = ("pytest", "pytest_timeout", "hypothesis")
MOST_WORKERS = 4
SHOWN_LINES = 8
PASSED, FAILED, UNFINISHED = "passed", "failed", "unfinished"
SELFCHECK = "neq doctor's self-check"
_PROGRESS_WITH_A_FAILURE = re.compile(r"[.sxX]*[FE][.FEsxX]*(\s|$)")


@dataclass(frozen=True)
class Check:
    """What became of some tests.

    Attributes:
        backends: those that are not trusted if it failed.
        detail: what was wrong, line by line, or how many tests passed.
    """

    name: str
    backends: tuple[str, ...]
    status: str
    detail: tuple[str, ...]
    seconds: float

    def row(self) -> Row:
        return {
            "check": self.name,
            "backends": " ".join(self.backends),
            "status": self.status,
            "detail": "\n".join(self.detail),
            "seconds": self.seconds,
        }


def missing_packages() -> list[str]:
    """Those that the tests need."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def run(
    backends: Sequence[str], deadline: Deadline, check: Callable[[], None] = lambda: None
) -> list[Check]:
    """All of them at once: nothing is timed.

    Args:
        backends: of ``triton``, ``cuda`` and ``aten`` those that run here.
    """
    told = {name: f"tests, {ENVIRONMENT_VARIABLE}={name}" for name in ("triton", "cuda")}
    told["aten"] = "tests, default backend"
    wanted = {name: _tests(name) for name in backends} | {SELFCHECK: _self_check()}
    ended = processes.run(wanted, deadline, check)
    found = [judge_tests(told[name], name, ended[name]) for name in backends]
    return [*found, *judge_self_check(ended[SELFCHECK], backends)]


def failed_backends(checks: Sequence[Check]) -> list[str]:
    """Backends that a test failed for."""
    return sorted({name for each in checks if each.status == FAILED for name in each.backends})


def _tests(backend: str) -> Job:
    arguments = ["-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # compiling takes most of the time
        arguments += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    environment: Mapping[str, str | None] = {
        "NEQ_TRITON_EXECUTOR": "cuda",
        "NEQ_CUDA_EXECUTOR": "cuda",
        "TRITON_INTERPRET": None,
        ENVIRONMENT_VARIABLE: "triton" if backend == "triton" else None,
        # The tests ask for deterministic algorithms, and cuBLAS for this.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    paths = {"triton": (FOLDER,), "cuda": OF_CUDA, "aten": OF_ANY_BACKEND}[backend]
    return Job("pytest", [*arguments, *paths], environment, ROOT)


def _self_check() -> Job:
    return Job("neq_kernels.doctor", environment={"TRITON_INTERPRET": None}, folder=ROOT)


def judge_tests(name: str, backend: str, ended: Ended) -> Check:
    """From pytest's exit status and its last line. Tests that were skipped did not pass."""
    lines = ended.output.strip().splitlines() or [""]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", lines[-1])}
    right = ended.code == 0 and counts.get(PASSED, 0) > 0 and "skipped" not in counts
    if right:
        status, detail = PASSED, [f"{counts[PASSED]} tests passed"]
    elif ended.code is None and not any(map(_PROGRESS_WITH_A_FAILURE.match, lines)):
        status, detail = UNFINISHED, ["not finished in the time there was"]
    else:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
        status, detail = FAILED, [*failures[:SHOWN_LINES], lines[-1]]
        if len(failures) > SHOWN_LINES:
            detail.insert(-1, f"and {len(failures) - SHOWN_LINES} more")
    return Check(name, (backend,), status, tuple(detail), ended.seconds)


def judge_self_check(ended: Ended, backends: Sequence[str]) -> list[Check]:
    """From its lines of JSON, one for each op and backend; a crash is a failure of the next one."""
    found = []
    others = []
    for line in ended.output.splitlines():
        try:
            op = json.loads(line)
        except json.JSONDecodeError:
            others.append(line)
            continue
        # An optimizer that is wrong, or a CPU that is, spoils everything.
        of = (op["backend"],) if op["device"] == "cuda" else tuple(backends)
        name = f"{SELFCHECK}: {op['op']}, {op['backend']} on {op['device']}"
        failures = op["failures"][:SHOWN_LINES]
        status = FAILED if failures else PASSED
        detail = failures or [f"{op['cases']} cases passed"]
        found.append(Check(name, of, status, tuple(detail), 0.0))
    if ended.code is None:
        text = "not finished in the time there was"
        found.append(Check(SELFCHECK, tuple(backends), UNFINISHED, (text,), ended.seconds))
    elif ended.code != 0 or not found:
        text = f"the process died (exit code {ended.code})"
        detail = (text, *others[-1:])
        found.append(Check(SELFCHECK, tuple(backends), FAILED, detail, ended.seconds))
    return found
