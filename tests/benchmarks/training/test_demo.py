from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common.interrupt import Interruptible
from benchmarks.training import demo
from benchmarks.training.run_folder import RunError, RunFolder

ROOT = Path(__file__).parents[3]
RUNS = ["scratch-dense", "scratch-neq", "continued-dense", "continued-neq", "continued-stochastic"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of the tiny net, run twice into the same folder."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    tiny = replace(
        demo.QUICK.base, model="tests.support.tiny:build", limit_train=60, batch=20, threads=1
    )
    plan = replace(demo.QUICK, base=tiny, scratch_epochs=2, continued_epochs=3)
    with Interruptible() as interruptible:
        for _ in range(2):
            demo.run_demo(plan, out, interruptible)
    return out


def test_runs_of_a_scene_start_alike_and_see_the_same_batches(finished: Path) -> None:
    for scene in ("scratch", "continued"):
        first = [RunFolder(finished / name).metrics()[0] for name in RUNS if name.startswith(scene)]
        # Everything is active in the first epoch, so only rounding may differ.
        losses = [record["train_loss"] for record in first]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
        assert all(record["frozen"] == 0 for record in first)


def test_second_scene_continues_the_first(finished: Path) -> None:
    settings = RunFolder(finished / "continued-neq").config()["settings"]
    assert settings["init"] == str(finished / "scratch-dense" / "weights.safetensors")
    last = RunFolder(finished / "scratch-dense").metrics()[-1]
    first = RunFolder(finished / "continued-neq").metrics()[0]
    assert first["train_loss"] < RunFolder(finished / "scratch-dense").metrics()[0]["train_loss"]
    assert first["lr"] < last["lr"]


def test_stochastic_run_freezes_half(finished: Path) -> None:
    record = RunFolder(finished / "continued-stochastic").metrics()[-1]
    assert record["active"]["0"] == [3, 6]
    assert record["active"]["4"] == [4, 8]
    assert record["active"]["9"] == [10, 10]


def test_report_and_summary(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    for expected in ("From scratch", "Continued training", "60 images of fashion-mnist", "at best"):
        assert expected in text, expected
    rows = json.loads((finished / "summary.json").read_text())["runs"]
    assert [(row["scene"], row["policy"]) for row in rows] == [
        ("From scratch", "dense"),
        ("From scratch", "neq"),
        ("Continued training", "dense"),
        ("Continued training", "neq"),
        ("Continued training", "stochastic"),
    ]
    assert all(0 < row["wgrad_share"] < 1 for row in rows)
    assert rows[4]["bound_last_epoch"] > 1
    for name in RUNS:
        assert (finished / name / "report.html").exists()


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("\\documentclass{article}")
    with (
        pytest.raises(RunError, match="holds something else than an earlier demo"),
        Interruptible() as interruptible,
    ):
        demo.run_demo(demo.QUICK, tmp_path, interruptible)
    assert precious.exists()
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 2


def test_interrupt(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [
        sys.executable,
        "-m",
        "benchmarks.training.demo",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "scratch-dense" / "profile.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
