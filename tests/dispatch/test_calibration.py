"""Calibration: when it runs, what it finds out, and what it leaves on disk."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time

import pytest
import torch

import neq_kernels as neq
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.dispatch import calibration, cost_model, stopwatch, tuning_table
from neq_kernels.dispatch.calibration import Calibration, CalibrationFile
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.dispatch.selection import selector
from neq_kernels.machine import CPU_CLASSES, cpu_class

ABOUT = {"cpu": "a", "threads": 2}
TABLES = cost_model.tables()
FOUND = Calibration("x86-avx2", {"dense linear rows": 2.0}, 0.1)


def times_of(table, off=lambda problem, n, strategy: 1.0):
    """What a machine of this table would measure, but for a factor."""
    return {
        (problem, n, strategy): table.seconds(problem, n, strategy) * off(problem, n, strategy)
        for problem, counts in calibration.canonical()
        for n in counts
        for strategy in Strategy
    }


@pytest.fixture
def measured(own_folder, monkeypatch):
    """Counts calibrations, which take no time and find what ``FOUND`` says."""
    calls = []
    monkeypatch.setenv(calibration.SWITCH, "1")
    monkeypatch.setattr(calibration, "is_busy", lambda: False)
    monkeypatch.setattr(
        calibration, "measure", lambda backend: calls.append(backend.name) or {1: 1}
    )
    monkeypatch.setattr(calibration, "fitted", lambda *_, own: FOUND)
    return calls


def step(mask=(True, False) * 8):
    layer = neq.nn.Linear(16, 16)
    layer.channels.set(list(mask))
    layer(torch.randn(9, 16)).sum().backward()


def test_the_tables_are_of_known_classes_and_complete():
    assert {table.name for table in TABLES} < set(CPU_CLASSES)
    assert len(TABLES) >= 2
    for table in TABLES:
        for problem, counts in calibration.canonical():
            for n in counts:
                times = [table.seconds(problem, n, strategy) for strategy in Strategy]
                assert all(0 < time < 1 for time in times)
            half = problem._replace(dtype=torch.float64)
            assert table.seconds(half, 1, Strategy.DENSE) == table.seconds(
                problem, 1, Strategy.DENSE
            )
    assert CostModel.of_class("other") == CostModel()


def test_a_calibration_sees_every_kind_in_both_layouts():
    kinds = {cost_model.kind(problem) for problem, _ in calibration.canonical()}
    layouts = ("nchw", "nhwc")
    convs = ("conv", "pointwise", "depthwise", "few inputs")
    assert kinds == {"linear rows", *(f"{name} {layout}" for name in convs for layout in layouts)}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_scales_are_found_by_strategy_and_kind(table):
    """A clock of half the speed, and custom kernels for linear layers that are slower still."""

    def off(problem, n, strategy):
        return 6.0 if cost_model.group(problem, strategy) == "custom linear rows" else 2.0

    known = calibration.fitted(times_of(table, off), TABLES, own=table.name)
    assert known.table == table.name
    assert known.misfit < 0.2
    assert known.scales["dense conv nchw"] == pytest.approx(2.0, rel=0.01)
    assert 5.0 < known.scales["custom linear rows"] < 6.0
    model, problem = known.model(), Problem((512, 64), (64, 64), None, False, torch.float32)
    for strategy in Strategy:
        name = cost_model.group(problem, strategy)
        expected = table.seconds(problem, 8, strategy) * known.scales[name]
        assert model.seconds(problem, 8, strategy) == pytest.approx(expected)


def test_the_table_that_fits_is_taken_if_the_own_one_does_not():
    generator = random.Random(0)
    noise = {}

    def off(problem, n, strategy):
        key = problem, n, strategy
        return noise.setdefault(key, math.exp(generator.gauss(0, 0.1)))

    for table in TABLES:
        known = calibration.fitted(times_of(table, off), TABLES)
        assert known.table == table.name
        others = [other for other in TABLES if other.name != table.name]
        assert calibration.fitted(times_of(table, off), others).misfit > known.misfit
    first, second = TABLES[:2]
    known = calibration.fitted(times_of(first, off), TABLES, own=second.name)
    assert known.table in (first.name, second.name)
    assert known.misfit <= calibration.MOST_MISFIT


def test_a_machine_unlike_every_table_is_found_out():
    generator = random.Random(0)
    wild = times_of(TABLES[0], lambda *_: math.exp(generator.gauss(0, 1.2)))
    known = calibration.fitted(wild, TABLES, own=TABLES[0].name)
    assert known.table is None
    assert known.misfit > calibration.MOST_MISFIT
    model, problem = known.model(), Problem((512, 64), (64, 64), None, False, torch.float32)
    # No custom kernel without a measured win.
    for n in (1, 8, 33, 64):
        assert model.strategy(problem, n, tuple(Strategy)) != Strategy.CUSTOM
        assert Strategy.CUSTOM in model.in_doubt(problem, n, tuple(Strategy))
    assert calibration.fitted(wild, []) == Calibration(None, {}, None)
    assert calibration.fitted({}, TABLES).table is None


def test_a_machine_that_is_not_steady_is_not_judged(measured, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda backend: measured.append("cpu") or {})
    step()
    step()
    assert measured == ["cpu"]
    assert selector.costs.calibration(selector.context("cpu")).misfit is None
    assert not list(tuning_table.directory().glob("calibration-*.json"))


def test_times_that_differ_from_round_to_round_count_for_nothing(monkeypatch):
    for spread, steady in ((1.2, True), (1.4, False)):
        rounds = [1.0, spread, 1.0]
        monkeypatch.setattr(
            stopwatch, "in_turns", lambda calls, *_, r=rounds, **__: dict.fromkeys(calls, r)
        )
        assert bool(calibration.measure(selector.backends["cpu"])) == steady


def test_a_real_one_takes_the_time_it_may(monkeypatch):
    monkeypatch.setattr(calibration, "_STEADY", math.inf)
    start = time.perf_counter()
    times = calibration.measure(selector.backends["cpu"], most_seconds=0.3)
    assert len(times) > 0
    assert all(0 < seconds < 10 for seconds in times.values())
    kinds = {cost_model.kind(problem) for problem, _, _ in times}
    assert time.perf_counter() - start > 0.3 or len(kinds) == 9
    assert calibration.measure(selector.backends["cpu"], most_seconds=-1) == {}


def test_it_runs_once_in_the_first_backward_of_a_partly_frozen_layer(measured):
    x = torch.randn(9, 16)
    layer = neq.nn.Linear(16, 16)
    layer(x).sum().backward()
    layer.channels.set([])
    layer(x.requires_grad_()).sum().backward()
    layer.channels.set([3, 5])
    y = layer(x)
    assert measured == []
    y.sum().backward()
    assert measured == ["cpu"]
    step()
    assert measured == ["cpu"]
    place = selector.context("cpu")
    assert selector.costs.calibration(place) == FOUND
    assert selector.costs.model(place) == CostModel.of_class("x86-avx2").scaled(FOUND.scales)
    selector.forget()  # a later process
    step()
    assert measured == ["cpu"]
    assert selector.costs.calibration(place) == FOUND
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    step()  # another number of threads is another machine
    torch.set_num_threads(before)
    assert measured == ["cpu", "cpu"]


def test_under_autocast_too(measured):
    layer = neq.nn.Linear(16, 16)
    layer.channels.set([3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(9, 16))
    y.sum().backward()
    assert measured == ["cpu"]


@pytest.mark.parametrize("off", ["switch", "never", "deterministic", "loaded", "busy", "locked"])
def test_where_it_does_not_run(off, measured, monkeypatch):
    if off == "switch":
        monkeypatch.setenv(calibration.SWITCH, "0")
    if off == "never":
        monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "never")
    if off == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
    if off == "loaded":
        neq.load_tuning_state_dict(json.loads(json.dumps(neq.tuning_state_dict())))
    if off == "busy":
        monkeypatch.setattr(calibration, "is_busy", lambda: True)
    if off == "locked":
        with selector.costs._file(selector.context("cpu")).alone() as is_alone:
            assert is_alone
            step()
    step()
    assert measured == []
    assert selector.costs.calibration(selector.context("cpu")) == Calibration(
        CostModel.of_class(cpu_class()).name, {}
    )


def test_a_wrong_switch_says_what_was_expected(own_folder, monkeypatch):
    monkeypatch.setenv(calibration.SWITCH, "yes")
    with pytest.raises(ValueError, match="NEQ_KERNELS_CALIBRATE: expected 0 or 1, got 'yes'"):
        calibration.is_asked_for()


def test_the_machine_is_busy_when_more_runs_than_it_has_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, expected in ((3.9, False), (4.0, False), (4.1, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        assert calibration.is_busy() == expected


# --- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "measured_with": {"cpu": "b"}, "calibration": {}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "calibration": {}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "calibration": '
        '{"table": "z80", "scales": {}, "misfit": 0.1}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "calibration": '
        '{"table": "../x86-avx2", "scales": {}, "misfit": 0.1}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "calibration": '
        '{"table": null, "scales": {"x": -1}, "misfit": 0.1}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "calibration": '
        '{"table": null, "scales": {"x": NaN}, "misfit": 0.1}}',
        "\x00\xff",
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning(own_folder, caplog, content):
    file = CalibrationFile(ABOUT)
    file.path.write_text(content, encoding="latin-1")
    assert file.read() is None
    assert file.read() is None
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.text
    file.write(FOUND)
    assert CalibrationFile(ABOUT).read() == FOUND


def test_one_of_a_newer_version_is_left_alone(own_folder, caplog):
    file = CalibrationFile(ABOUT)
    newer = '{"format": 99, "measured_with": {"cpu": "a", "threads": 2}}'
    file.path.write_text(newer)
    assert file.read() is None
    file.write(FOUND)
    assert file.path.read_text() == newer
    assert len(caplog.records) == 1


def test_where_nothing_can_be_written_it_warns_and_serves(measured, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning_table.DIRECTORY_VARIABLE, str(tmp_path / "file" / "folder"))
    selector.forget()
    step()
    assert measured == ["cpu"]
    assert selector.costs.calibration(selector.context("cpu")) == FOUND
    assert "is not saved" in caplog.text


TRAIN = """
import logging, torch
import neq_kernels as neq
from neq_kernels.dispatch import calibration
from neq_kernels.dispatch.selection import selector

logging.basicConfig()
calibration.is_busy = lambda: False
calibration._STEADY = float("inf")  # eight processes are no steady machine
torch.manual_seed(0)
layer = neq.nn.Linear(64, 64)
x = torch.randn(256, 64)
for i in range(30):
    layer.channels.set([(i + j) % 64 for j in range(10 + i)])
    layer.zero_grad()
    layer(x).square().sum().backward()
    exact = (2 * layer(x)).detach().T @ x
    assert torch.allclose(layer.weight.grad[layer.channels.active],
                          exact[layer.channels.active], rtol=1e-4, atol=1e-3)
    assert (layer.weight.grad[layer.channels.frozen] == 0).all()
print(len(selector.table(selector.context("cpu"))))
"""


def test_eight_processes_at_once(tmp_path):
    """All of them are right, and whole files remain."""
    environment = os.environ | {
        tuning_table.DIRECTORY_VARIABLE: str(tmp_path),
        tuning_table.MEASURE_VARIABLE: "doubt",
        calibration.SWITCH: "1",
    }
    command = [sys.executable, "-c", TRAIN]
    runs = [
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(8)
    ]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
        assert "is ignored" not in errors
    calibrations = list(tmp_path.glob("calibration-*.json"))
    assert len(calibrations) == 1
    json.loads(calibrations[0].read_text())
    for path in tmp_path.glob("tuning-*.json"):
        json.loads(path.read_text())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_brings_its_calibration(measured, caplog):
    step()
    state = json.loads(json.dumps(neq.tuning_state_dict()))
    assert state["cpu"]["calibration"]["table"] == "x86-avx2"
    selector.forget()
    tuning_table.directory().joinpath("nothing").touch()
    for path in tuning_table.directory().glob("*.json"):
        path.unlink()
    neq.load_tuning_state_dict(state)
    assert selector.costs.calibration(selector.context("cpu")) == FOUND
    step()
    assert measured == ["cpu"]
    broken = {"cpu": {**state["cpu"], "calibration": {"table": "z80"}}}
    with pytest.raises(ValueError, match="calibration: expected what"):
        neq.load_tuning_state_dict(broken)
    # One of 0.2.0 had none: the table of this class, as it is.
    del state["cpu"]["calibration"]
    neq.load_tuning_state_dict(state)
    known = selector.costs.calibration(selector.context("cpu"))
    assert known == Calibration(CostModel.of_class(cpu_class()).name, {})
