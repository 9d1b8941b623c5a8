from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import train
from benchmarks.training.run import Run
from benchmarks.training.run_folder import RunError, RunFolder

ROOT = Path(__file__).parents[3]
TINY = ["--model", "tests.support.tiny:build", "--batch", "16", "--probe", "8", "--lr", "0.02"]
POLICIES = ["dense", "neq", "stochastic"]


def arguments(out: Path, data: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--data", str(data), "--no-profile", "--threads", "1", *TINY, *more]


def equal(a: Any, b: Any) -> bool:
    """Bit-equal, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def untimed(state: Any) -> Any:
    """Without what a clock wrote."""
    if isinstance(state, dict):
        clocks = {"seconds", "step_ms"}
        return {key: untimed(value) for key, value in state.items() if key not in clocks}
    return [untimed(v) for v in state] if isinstance(state, list) else state


def checkpoint(out: Path) -> dict[str, Any]:
    state = RunFolder(out).load_checkpoint()
    assert state is not None
    return untimed(state)


def metrics(out: Path) -> list[dict[str, Any]]:
    return untimed(RunFolder(out).metrics())


def start(out: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.training.train", *arguments(out, data, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_epochs(out: Path, n: int, process: subprocess.Popen[str]) -> None:
    """Until ``n`` epochs are written down and another one is being trained."""
    deadline = time.monotonic() + 120
    while len(RunFolder(out).metrics()) < n or not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_writes_its_files(
    tmp_path: Path, images_npz: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--policy", policy, "--epochs", "3")) == 0
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.csv", "checkpoint.pt"} <= names
    assert {"weights.safetensors", "report.html", "accuracy.png", "step_time.png"} <= names
    assert not any(name.endswith(".tmp") for name in names)
    records = RunFolder(out).metrics()
    assert [record["epoch"] for record in records] == [0, 1, 2]
    phases = {"data", "forward", "backward", "optimizer", "controller", "eval"}
    assert all(set(record["seconds"]) == phases for record in records)
    assert all(record["steps"] == 3 and record["images"] == 48 for record in records)
    assert len((out / "summary.csv").read_text().splitlines()) == 4
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    tmp_path: Path, images_npz: Path, policy: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--policy", policy, "--optimizer", optimizer, "--epochs", "5", "--eps", "0.02"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(whole, images_npz, *more)) == 0

    stop_after(3, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        train.main(arguments(parts, images_npz, *more))
    monkeypatch.undo()
    torch.manual_seed(12345)  # what the process did before must not matter
    assert train.main(["--out", str(parts), "--resume"]) == 0

    assert equal(checkpoint(whole), checkpoint(parts))
    assert equal(metrics(whole), metrics(parts))
    if policy == "neq":
        assert any(record["frozen"] > 0 for record in metrics(whole))


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die in the middle of the epoch after ``epochs`` whole ones."""
    train_epoch = Run.train_epoch

    def dying(run: Run, on_step: Any) -> Any:
        def step(loss: float) -> None:
            on_step(loss)
            if run.epoch == epochs:
                raise RuntimeError("stopped on purpose")

        return train_epoch(run, step)

    monkeypatch.setattr(Run, "train_epoch", dying)


def test_kill_in_mid_epoch_loses_at_most_that_epoch(tmp_path: Path, images_npz: Path) -> None:
    more = ["--policy", "neq", "--eps", "0.02", "--epochs", "40"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed, images_npz, *more)
    wait_for_epochs(killed, 3, process)
    process.kill()
    process.wait()
    written = len(RunFolder(killed).metrics())
    saved = checkpoint(killed)["epoch"]
    assert 2 <= written - 1 <= saved <= written < 40

    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 39, "cut sho')
    (killed / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resumed = start(killed, images_npz, *more, "--resume")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert output.count("test accuracy") == 40 - saved

    uninterrupted = start(whole, images_npz, *more)
    assert uninterrupted.wait(120) == 0
    assert equal(checkpoint(whole), checkpoint(killed))
    assert equal(metrics(whole), metrics(killed))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_cleanly(
    tmp_path: Path, images_npz: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    process = start(out, images_npz, "--policy", "dense", "--epochs", "4000")
    wait_for_epochs(out, 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "continue with" in output
    assert "Traceback" not in output
    assert checkpoint(out)["epoch"] == len(metrics(out))
    assert (out / "report.html").exists()


def test_finished_run_can_be_resumed_without_harm(tmp_path: Path, images_npz: Path) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--policy", "dense", "--epochs", "2")) == 0
    before = checkpoint(out)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert equal(before, checkpoint(out))
    assert len(metrics(out)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_corrupt_checkpoint_is_reported_and_nothing_is_lost(
    tmp_path: Path, images_npz: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--policy", "dense", "--epochs", "2")) == 0
    path = out / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"" if damage == "empty" else b"not a checkpoint")
    path.write_bytes(content)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "checkpoint.pt" in message
    assert "cannot be read" in message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_resume_with_other_settings_is_refused(
    tmp_path: Path, images_npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--policy", "dense", "--epochs", "1")) == 0
    assert train.main(["--out", str(out), "--resume", "--lr", "0.5"]) == 2
    assert "lr 0.02, got 0.5" in capsys.readouterr().err


def test_existing_run_is_not_overwritten(
    tmp_path: Path, images_npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = arguments(out, images_npz, "--policy", "dense", "--epochs", "1")
    assert train.main(command) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert train.main(command) == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "resnet21"], "resnet21"),
        (["--batch", "1000"], "batch: expected at most the 56 training images, got 1000"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--p", "1.5"], "p: expected a share between 0 and 1"),
        (["--policy", "fixed"], "masks: expected a file"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--data", "nowhere.npz"], "no such file: nowhere.npz"),
    ],
)
def test_settings_that_cannot_be_served(
    tmp_path: Path,
    images_npz: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, *more)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "there is no run to read here" in capsys.readouterr().err


def test_run_folder_metrics_with_a_broken_line_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: not valid JSON lines"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "bf16"],
        ["--channels-last"],
        ["--optimizer", "adam", "--schedule", "step", "--milestones", "1", "2"],
        ["--schedule", "constant", "--image-size", "6", "--augment", "flip"],
        ["--velocity", "reference", "--similarity", "sample", "--frozen-state", "keep"],
        ["--others", "follow", "--warmup", "0", "--mu", "0"],
    ],
)
def test_options(tmp_path: Path, images_npz: Path, more: list[str]) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--epochs", "3", *more)) == 0
    rates = [record["lr"] for record in metrics(out)]
    if "--milestones" in more:
        assert rates == pytest.approx([0.02, 0.002, 0.0002])
    elif "constant" in more:
        assert rates == [0.02] * 3
    else:
        assert rates == pytest.approx([0.02, 0.015, 0.005])


def test_fixed_policy_trains_the_named_neurons_only(tmp_path: Path, images_npz: Path) -> None:
    masks = {"0": [1, 3], "1": [1, 3], "4": [], "5": [], "9": [0, 1]}
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(masks))
    start_from, out = tmp_path / "start", tmp_path / "run"
    assert train.main(arguments(start_from, images_npz, "--policy", "dense", "--epochs", "1")) == 0
    weights = str(start_from / "weights.safetensors")
    more = ["--policy", "fixed", "--masks", str(path), "--init", weights, "--epochs", "2"]
    assert train.main(arguments(out, images_npz, *more)) == 0
    before, after = checkpoint(start_from)["model"], checkpoint(out)["model"]
    for name, active in masks.items():
        different = before[f"{name}.weight"] != after[f"{name}.weight"]
        moved = different.view(len(different), -1).any(1)
        assert moved.nonzero().flatten().tolist() == active


@pytest.mark.parametrize("content", ["[1]", "{", '{"0": 1}'])
def test_unreadable_masks(
    tmp_path: Path, images_npz: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "masks.json"
    path.write_text(content)
    more = ["--policy", "fixed", "--masks", str(path)]
    assert train.main(arguments(tmp_path / "run", images_npz, *more)) == 2
    assert "masks.json: expected" in capsys.readouterr().err


def test_threads_setting(tmp_path: Path, images_npz: Path) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, images_npz, "--policy", "dense", "--epochs", "1")) == 0
    assert RunFolder(out).config()["machine"]["threads"] == 1


def test_bound_follows_the_frozen_share(tmp_path: Path, images_npz: Path) -> None:
    out = tmp_path / "run"
    more = ["--policy", "stochastic", "--p", "0.5", "--epochs", "2", "--profile"]
    assert train.main(arguments(out, images_npz, *more)) == 0
    profile = RunFolder(out).read_json("profile.json")
    assert 0 < profile["wgrad"] < 1
    first, second = RunFolder(out).metrics()
    assert first["frozen"] == 0
    assert first["bound"] == 1
    assert second["frozen"] > 0.4
    assert 1 < second["bound"] < 1 / (1 - profile["wgrad"] - profile["optimizer"])


@pytest.mark.parametrize("model", ["mobilenet_v3_small", "timm:resnet10t"])
def test_models_of_torchvision_and_timm_by_name(
    tmp_path: Path, images_npz: Path, model: str
) -> None:
    out = tmp_path / "run"
    more = ["--model", model, "--policy", "neq", "--epochs", "1", "--limit-train", "16"]
    assert train.main(arguments(out, images_npz, *more, "--profile")) == 0
    assert RunFolder(out).metrics()[0]["bound"] == 1
