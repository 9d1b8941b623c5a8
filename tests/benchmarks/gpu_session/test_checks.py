"""Jobs that end, hang or die, and what is read from the tests' output."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks.common import processes
from benchmarks.common.deadline import Deadline
from benchmarks.common.interrupt import Interrupted
from benchmarks.common.processes import Ended, Job
from benchmarks.gpu_session import checks as gpu_session_checks
from benchmarks.gpu_session.checks import FAILED, PASSED, UNFINISHED


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that a job can run."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return Job(name, folder=tmp_path)

    return write


def test_jobs_run_side_by_side_and_what_hangs_is_ended(module):
    told = {
        "good": module("good", "print('done')"),
        "bad": module("bad", "raise SystemExit(3)"),
        "hangs": module("hangs", "import time; print('began', flush=True); time.sleep(60)"),
    }
    start = time.monotonic()
    ended = processes.run(told, Deadline.after(1.0), grace=0.5)
    assert time.monotonic() - start < 5
    assert (ended["good"].code, ended["good"].output) == (0, "done\n")
    assert ended["bad"].code == 3
    assert (ended["hangs"].code, ended["hangs"].output) == (None, "began\n")


def test_a_job_that_ignores_the_request_and_its_children_end_too(module, tmp_path):
    text = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    ended = processes.run({"stubborn": module("stubborn", text)}, Deadline.after(0.6), grace=0.2)
    assert ended["stubborn"].code is None
    pid = int(ended["stubborn"].output)
    for _ in range(50):
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]  # noqa: SIM115
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a job outlived it")


def test_an_interrupt_ends_the_jobs(module):
    calls = []

    def check():
        calls.append(None)
        if len(calls) > 2:
            raise Interrupted(2)

    job = module("hangs", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(Interrupted):
        processes.run({"hangs": job}, Deadline.after(60.0), check, grace=0.5)
    assert time.monotonic() - start < 5


def test_variables_are_set_and_removed(module, monkeypatch):
    monkeypatch.setenv("NEQ_TEST_GONE", "1")
    text = "import os; print(os.environ.get('NEQ_TEST_GONE'), os.environ.get('NEQ_TEST_NEW'))"
    job = module("env", text)
    told = Job(job.module, (), {"NEQ_TEST_GONE": None, "NEQ_TEST_NEW": "2"}, job.folder)
    assert processes.run({"env": told}, Deadline.after(20.0))["env"].output == "None 2\n"


def judged(code, output):
    return gpu_session_checks.judge_tests("tests", "triton", Ended(code, output, 1.0))


def test_passed_failed_and_unfinished_tests():
    assert judged(0, ".....\n5 passed in 1.0s\n").status == PASSED
    failing = judged(1, "..F\nFAILED tests/a.py::x - assert\nmore\n1 failed, 2 passed in 1s")
    assert failing.status == FAILED
    assert failing.detail == ("FAILED tests/a.py::x - assert", "1 failed, 2 passed in 1s")
    assert failing.backends == ("triton",)
    assert judged(None, "..... [ 20%]\n").status == UNFINISHED
    assert judged(None, "bringing up nodes\n..F.. [ 20%]\n").status == FAILED
    assert judged(None, "").status == UNFINISHED


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (0, "3 passed, 1 skipped in 1s"),  # what was skipped did not pass
        (0, "3 skipped in 1s"),
        (5, "no tests ran in 0.1s"),
        (1, "No module named pytest"),
        (-11, "Fatal Python error: Segmentation fault"),
        (2, "1 error in 0.5s"),
        (0, ""),
    ],
)
def test_whatever_is_no_plain_success_failed(code, output):
    assert judged(code, output).status == FAILED


def line(op, backend, device, *failures):
    return json.dumps(
        {"op": op, "backend": backend, "device": device, "cases": 4, "failures": failures}
    )


def self_check(code, *lines):
    both = ("triton", "aten")
    return gpu_session_checks.judge_self_check(Ended(code, "\n".join(lines), 1.0), both)


def test_the_self_check_blames_a_backend_on_the_gpu_or_everything():
    good = line("linear", "aten", "cuda")
    bad = line("conv", "triton", "cuda", "off by 1")
    assert (
        gpu_session_checks.failed_backends(self_check(0, good, line("conv", "triton", "cuda")))
        == []
    )
    assert gpu_session_checks.failed_backends(self_check(0, good, bad)) == ["triton"]
    cpu = line("SGD row step", "torch", "cpu", "frozen rows moved")
    assert gpu_session_checks.failed_backends(self_check(0, good, cpu)) == ["aten", "triton"]


def test_a_self_check_that_dies_or_says_nothing_failed():
    good = line("linear", "aten", "cuda")
    died = self_check(-6, good, "free(): invalid pointer")
    assert gpu_session_checks.failed_backends(died) == ["aten", "triton"]
    assert died[-1].detail == ("the process died (exit code -6)", "free(): invalid pointer")
    assert gpu_session_checks.failed_backends(self_check(0)) == ["aten", "triton"]
    slow = self_check(None, good)
    assert gpu_session_checks.failed_backends(slow) == []
    assert slow[-1].status == UNFINISHED


def test_the_tests_are_told_to_use_the_gpu(monkeypatch):
    seen = {}

    def run(wanted, deadline, check):
        seen.update(wanted)
        good = line("linear", "aten", "cuda")
        return {
            name: Ended(0, good if name == gpu_session_checks.SELFCHECK else "2 passed in 1s", 1.0)
            for name in wanted
        }

    monkeypatch.setattr(processes, "run", run)
    checks = gpu_session_checks.run(["triton", "cuda", "aten"], Deadline.after(1.0))
    assert [check.status for check in checks] == [PASSED] * 4
    assert seen["triton"].environment["NEQ_TRITON_EXECUTOR"] == "cuda"
    assert seen["triton"].environment["NEQ_KERNELS_BACKEND"] == "triton"
    assert seen["triton"].arguments[-1] == "tests/backends/triton"
    assert seen["cuda"].environment["NEQ_CUDA_EXECUTOR"] == "cuda"
    assert seen["cuda"].arguments[-2:] == list(gpu_session_checks.OF_CUDA)
    assert seen["aten"].environment["NEQ_KERNELS_BACKEND"] is None
    for path in seen["aten"].arguments[-2:]:
        assert (gpu_session_checks.ROOT / path.split("::")[0]).is_file()
    assert seen[gpu_session_checks.SELFCHECK].module == "neq_kernels.doctor"


def test_the_tests_that_are_named_exist():
    for path in gpu_session_checks.OF_CUDA:
        assert (gpu_session_checks.ROOT / path).is_file()
    for path in gpu_session_checks.OF_ANY_BACKEND:
        file, _, name = path.partition("::")
        assert f"def {name}" in (gpu_session_checks.ROOT / file).read_text()
    capture = (gpu_session_checks.ROOT / gpu_session_checks.OF_ANY_BACKEND[0]).read_text()
    assert 'if EXECUTOR == "cuda":\n    test_a_graph_serves_every_mask = ' in capture
