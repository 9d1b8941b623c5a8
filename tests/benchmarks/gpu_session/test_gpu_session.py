"""python -m benchmarks.gpu_session end to end: CPU tensors, a made-up clock and a made-up counter.

Nothing here was measured on a GPU, and the page that it makes says so.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.common import gpu_device, processes
from benchmarks.common.deadline import Deadline
from benchmarks.common.interrupt import Interrupted
from benchmarks.common.processes import Ended
from benchmarks.common.records import load
from benchmarks.gpu_session import __main__ as gpu_session
from benchmarks.gpu_session import checks as gpu_session_checks
from benchmarks.gpu_session import report
from benchmarks.kernels import gpu as kernels_gpu
from benchmarks.steps import comparison, gpu_energy
from benchmarks.steps import gpu as steps_gpu
from neq_kernels.measure import EnergyMeter, bandwidth
from tests.support import fake_gpu
from tests.support.fake_gpu import FakeNvml
from tests.support.small_problems import CONV, LINEAR, SHAPE
from tests.support.step_workloads import TINY

WORKLOAD = replace(TINY["tiny"], layouts=("nhwc",), autocast=torch.bfloat16)
GOOD = json.dumps(
    {"op": "conv_backward", "backend": "aten", "device": "cuda", "cases": 9, "failures": []}
)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU that is none. What the tests of the kernels say can be changed; measured parts run in
    this process."""
    told = {"triton": Ended(0, "12 passed in 1s", 1.0), "aten": Ended(0, "7 passed in 1s", 1.0)}
    told[gpu_session_checks.SELFCHECK] = Ended(0, GOOD, 1.0)
    started = []

    def run(wanted, deadline, check=lambda: None, grace=0.0):
        check()
        ended = {}
        for name, job in wanted.items():
            started.append(name)
            if name in told:
                ended[name] = told[name]
            else:
                code = importlib.import_module(job.module).main(list(job.arguments))
                ended[name] = Ended(code, "", 1.0)
        return ended

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(gpu_device, "found", lambda: True)
    monkeypatch.setattr(gpu_device, "facts", fake_gpu.facts)
    monkeypatch.setattr(gpu_device, "own_backends", lambda: ["triton", "aten"])
    monkeypatch.setattr(gpu_device.Lab, "on_gpu", fake_gpu.lab)
    shapes = [SHAPE, replace(SHAPE, layer="linear", problem=LINEAR)]
    shapes.append(replace(SHAPE, problem=CONV._replace(channels_last=False)))
    monkeypatch.setattr(kernels_gpu, "gpu_shapes", lambda: shapes)
    small = kernels_gpu.GpuKernelOptions((1.0, 0.5, 0.1), 1e-4)
    monkeypatch.setattr(
        kernels_gpu, "GpuKernelOptions", lambda failed: replace(small, failed=failed)
    )
    steps = steps_gpu.GpuStepOptions((1.0, 0.5), 1e-3, 2, least_rounds=2)
    monkeypatch.setattr(steps_gpu, "GpuStepOptions", lambda failed: replace(steps, failed=failed))
    energy = gpu_energy.EnergyOptions((0.5,), 5e-3, 2)
    monkeypatch.setattr(gpu_energy, "EnergyOptions", lambda failed: replace(energy, failed=failed))
    for module in (steps_gpu, gpu_energy):
        monkeypatch.setattr(module, "GPU_WORKLOADS", (WORKLOAD,))
    nvml = FakeNvml()
    monkeypatch.setattr(
        gpu_energy, "EnergyMeter", lambda gpus: EnergyMeter(gpus=[0], powercap=tmp_path, nvml=nvml)
    )
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**16)
    told["started"] = started
    return told


def run(out, *arguments):
    return gpu_session.main(["--out", str(out), *arguments])


def rows_of(out, phase):
    return load(report.record_of(phase, out))[1]


def test_everything_in_one_run(card, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out) == 0
    assert card["started"] == [
        "triton",
        "aten",
        gpu_session_checks.SELFCHECK,
        "kernels",
        "steps",
        "energy",
    ]
    header, rows = load(out / "gpu.jsonl")
    assert header["settings"]["gpu"]["device"] == fake_gpu.NAME
    assert [row["status"] for row in rows] == ["passed"] * 3 + ["measured"] * 3
    names = {row["provider"] for row in rows_of(out, "kernels")}
    assert {"dense", "index_select", "neq", "neq custom", "neq pack", "neq aten"} <= names
    steps = rows_of(out, "steps")
    assert {(row["backend"], row["r"]) for row in steps} == {
        (backend, r) for backend in ("cpu", "aten") for r in (1.0, 0.5)
    }
    assert {row["provider"] for row in steps if row["backend"] == "cpu"} == {
        "dense",
        "peer1",
        "neq",
        comparison.NO_WGRAD,
    }
    assert all("bound" in row for row in steps if row["provider"] == "neq")
    dense, ours = rows_of(out, "energy")
    assert dense["joules_per_step_median"] == pytest.approx(1 / dense["steps"], rel=1e-3)
    expected = ours["steps"] / dense["steps"]
    assert ours["over_dense_median"] == pytest.approx(expected, rel=1e-3)
    for name in ("gpu", "gpu_kernels", "gpu_steps", "gpu_energy"):
        lines = (out / f"{name}.csv").read_text().splitlines()
        assert lines[0].startswith("# command: python")
        assert list(csv.DictReader(lines[1:]))
    page = (out / report.PAGE).read_text()
    assert fake_gpu.NAME in page
    for picture in ("gpu_kernels.png", "gpu_steps.png"):
        assert page.count(f"]({picture})") == 1
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for linked in re.findall(r"\]\(([^)]+)\)", page):
        assert (out / linked).is_file()
    assert {path.suffix for path in out.iterdir()} == {".jsonl", ".csv", ".png", ".md"}
    assert "FAILED" not in capsys.readouterr().out
    assert "**" not in page


def test_the_page_is_made_from_the_records_alone(card, tmp_path, capsys):
    out = tmp_path / "out"
    run(out, "--phases", "kernels")
    first = (out / report.PAGE).read_text()
    for name in (report.PAGE, "gpu_kernels.png", "gpu_kernels.csv"):
        (out / name).unlink()
    assert report.main([str(out)]) == 0
    assert (out / report.PAGE).read_text() == first
    assert (out / "gpu_kernels.csv").exists()
    assert report.NOT_RUN in first
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_speedup_while_a_test_fails(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_device.Lab, "on_gpu", lambda: fake_gpu.lab(backend="aten"))
    monkeypatch.setattr(gpu_device, "own_backends", lambda: ["aten"])
    card["aten"] = Ended(1, "FAILED tests/x.py::test - wrong\n1 failed, 3 passed in 1s", 1.0)
    out = tmp_path / "out"
    assert run(out) == 1
    page = (out / report.PAGE).read_text()
    assert "FAILED tests/x.py::test - wrong" in page
    assert "1 of 2 checks failed; of aten nothing is timed" in page
    assert len(re.findall(r"^\| .* \| FAILED \|", page, re.M)) == 1
    for phase in ("kernels", "steps", "energy"):
        for row in rows_of(out, phase):
            if str(row.get("provider", "")).startswith("neq"):
                assert not any("over_" in key or "speedup" in key for key in row)
    assert "not timed: tests of aten failed" in page
    assert "FAILED" in capsys.readouterr().out


def test_no_gpu_and_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_device, "found", lambda: False)
    for module in (gpu_session, kernels_gpu, steps_gpu, gpu_energy):
        assert module.main(["--out", str(tmp_path / "out")]) == 3
        said = capsys.readouterr()
        assert "No GPU was found" in said.err
        assert "NOTHING was measured" in said.err
        assert said.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--phases", "all"], ["--phases"]]
)
def test_bad_arguments_are_refused(card, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_in_the_way_is_told(card, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 2
    assert capsys.readouterr().err.startswith("error:")
    monkeypatch.setattr(gpu_session_checks, "PACKAGES", ("pytest", "no_such_package"))
    assert run(tmp_path / "out") == 2
    assert "the tests need no_such_package: pip install" in capsys.readouterr().err
    assert run(tmp_path / "out", "--phases", "energy") == 0


def test_phases_that_find_no_time_are_named(card, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        gpu_session.Deadline, "after", lambda s: Deadline(now[0] + s, lambda: now[0])
    )
    told = []

    def slow(wanted, deadline, check):
        told.extend((name, deadline.left) for name in wanted)
        now[0] += 59.9
        return {name: Ended(None, "", 59.9) for name in wanted}

    monkeypatch.setattr(processes, "run", slow)
    out = tmp_path / "out"
    assert run(out, "--minutes", "1", "--phases", "kernels", "steps") == 1
    assert told == [("kernels", pytest.approx(30 + gpu_session.OVERRUN))]
    rows = load(out / "gpu.jsonl")[1]
    assert rows[0]["status"] == "ended after 60 s: it did not come to an end by itself"
    assert rows[1] == {"phase": "steps", "status": "left out: no time left"}
    page = (out / report.PAGE).read_text()
    assert "steps: left out: no time left" in page


def test_time_that_a_phase_leaves_goes_to_the_next_ones(card, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session.Deadline, "after", lambda s: Deadline(s, lambda: 0.0))
    told = {}

    def at_once(wanted, deadline, check):
        told.update((name, (job.arguments[3], deadline.left)) for name, job in wanted.items())
        return {name: Ended(0, "", 0.0) for name in wanted}

    monkeypatch.setattr(processes, "run", at_once)
    assert run(tmp_path, "--minutes", "1", "--phases", "energy", "kernels", "steps") == 0
    shares = gpu_session.PHASES
    first = 60 * shares["kernels"] / (shares["kernels"] + shares["steps"] + shares["energy"])
    second = 60 * shares["steps"] / (shares["steps"] + shares["energy"])
    expected = {"kernels": first, "steps": second, "energy": 60.0}
    assert list(told) == list(expected)
    for name, seconds in expected.items():
        assert told[name] == (f"{seconds:.0f}", pytest.approx(seconds + gpu_session.OVERRUN))


def test_cells_that_find_no_time_are_on_the_page(card, tmp_path, monkeypatch):
    class Spent(Deadline):
        left = 0.0

    for module in (kernels_gpu, steps_gpu, gpu_energy):
        monkeypatch.setattr(module, "Deadline", Spent)
    out = tmp_path / "out"
    assert run(out, "--phases", "kernels", "steps", "energy") == 0
    assert all(row["left_out"] for phase in ("kernels", "steps") for row in rows_of(out, phase))
    page = (out / report.PAGE).read_text()
    assert "Left out for lack of time" in page
    assert "net linear float32 rows (3)" in page


def test_an_old_record_is_not_taken_for_a_new_one(card, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(out, "--phases", "kernels") == 0
    monkeypatch.setattr(processes, "run", lambda wanted, *_: {"kernels": Ended(-9, "", 1.0)})
    assert run(out, "--phases", "kernels") == 1
    assert not report.record_of("kernels", out).exists()
    assert "kernels: the process died (signal 9)" in (out / report.PAGE).read_text()


def test_an_interrupt_keeps_what_was_measured(card, tmp_path, monkeypatch):
    right = processes.run

    def interrupted(wanted, *rest):
        if "steps" in wanted:
            raise Interrupted(2)
        return right(wanted, *rest)

    monkeypatch.setattr(processes, "run", interrupted)
    out = tmp_path / "out"
    assert run(out) == 130
    assert rows_of(out, "kernels")
    page = (out / report.PAGE).read_text()
    assert "interrupted by SIGINT" in page
    assert "\n## Kernels\n" in page
    assert "## Energy" not in page


def test_a_phase_that_is_interrupted_keeps_its_rows(card, tmp_path, monkeypatch):
    checks = []

    def check(self):
        checks.append(None)
        if len(checks) > 1:
            raise Interrupted(15)

    monkeypatch.setattr(kernels_gpu.Interruptible, "check", check)
    assert kernels_gpu.main(["--out", str(tmp_path)]) == 143
    assert {row["share"] for row in rows_of(tmp_path, "kernels")} == {1.0}
    assert (tmp_path / "gpu_kernels.csv").exists()
