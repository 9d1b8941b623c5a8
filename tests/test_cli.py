"""The ``neq`` command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from neq_kernels import cli
from neq_kernels.backends import cuda
from neq_kernels.dispatch import selection
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import runner
from neq_kernels.doctor.checks import Check

PASSED = Check("linear_backward", "aten", "cpu", 30, ())
FAILED = Check("conv_backward", "aten", "cpu", 180, tuple(f"case {i}: off" for i in range(5)))


@pytest.fixture
def neq(capsys):
    """Runs the command in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def checks(monkeypatch):
    """What the self-check is made to find."""

    def find(*found: Check) -> None:
        monkeypatch.setattr(runner, "run_apart", lambda: iter(found))

    return find


def test_doctor_on_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "neq_kernels.cli", "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for section in ("Machine", "Backends", "Energy counters", "Self-check"):
        assert section in done.stdout
    for name, reason in selector.availability():
        assert name in done.stdout
        assert reason is None or reason in done.stdout
    assert "FAILED" not in done.stdout
    assert done.stdout.count(" ok") >= 9


def test_doctor_fails_when_a_check_fails(neq, checks):
    checks(PASSED, FAILED, PASSED)
    code, out, _ = neq("doctor")
    assert code == 1
    lines = [line.strip() for line in out.splitlines()]
    assert "conv_backward         aten on cpu     180 cases  FAILED in 5" in lines
    assert lines[lines.index("case 2: off") + 1].startswith("linear_backward")


def test_doctor_says_which_backend_serves_and_why_others_do_not(neq, checks, monkeypatch):
    checks(PASSED)
    reported = [("cpu", "the extension was not built"), ("aten", None), ("reference", None)]
    monkeypatch.setattr(selector, "availability", lambda: reported)
    monkeypatch.setattr(selector, "backends_for", lambda device: ("aten",))
    code, out, _ = neq("doctor")
    assert code == 0
    assert "cpu        cannot be used: the extension was not built" in out
    assert "aten       used for cpu" in out
    assert "reference  not chosen" in out


def test_doctor_reports_a_forced_backend_that_does_not_exist(neq, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "abacus")
    selector.forget()
    code, out, _ = neq("doctor")
    assert code == 1
    assert "expected one of" in out
    assert "abacus" in out


@pytest.mark.parametrize(
    ("is_there", "is_built", "is_told"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_doctor_tells_how_to_build_the_cuda_kernels(
    neq, checks, monkeypatch, tmp_path, is_there, is_built, is_told
):
    """On a machine with GPUs, where they were left out."""
    checks(PASSED)
    monkeypatch.setattr(selector, "availability", lambda: [("aten", None)])
    monkeypatch.setattr(selector, "backends_for", lambda device: ("aten",))
    monkeypatch.setattr(doctor_checks, "device_types", lambda: ("cpu",))
    monkeypatch.setattr(cli, "_about", lambda: {"cores": 2})
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    if is_built:
        cuda.LIBRARY.touch()
    gpus = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    code, out, _ = neq("doctor")
    assert code == 0
    command = "NEQ_BUILD_CUDA=1 NEQ_CUDA_ARCHS='8.6;9.0' pip install --no-build-isolation ."
    assert (command in out) == is_told
    assert ("NEQ_BUILD_CUDA" in out) == is_told


def test_flops_by_both_conventions(neq):
    code, out, _ = neq(
        "flops", "benchmarks.common.models:resnet32", "--size", "32", "--classes", "10"
    )
    assert code == 0
    title, *rows = out.splitlines()
    assert title == "benchmarks.common.models:resnet32, one 3x32x32 image: 69.47M MACs forward"
    figures = {row.split()[0]: row.split()[1] for row in rows}
    assert figures["paper"] == figures["forward"] == figures["wgrad"] == "138.94M"
    assert figures["executed"] == "415.93M"


@pytest.mark.parametrize(
    ("convention", "there", "not_there"),
    [("paper", "GEMM", "dgrad"), ("executed", "dgrad", "GEMM")],
)
def test_flops_by_one_convention(neq, convention, there, not_there):
    code, out, _ = neq("flops", "resnet18", "--size", "64", "--convention", convention)
    assert code == 0
    assert there in out
    assert not_there not in out


def test_flops_as_json(neq):
    arguments = ("--size", "40x32", "--classes", "7", "--in-channels", "1", "--json")
    code, out, _ = neq("flops", "timm:resnet18", *arguments)
    assert code == 0
    saved = json.loads(out)
    assert saved["size"] == [40, 32]
    head = next(layer for layer in saved["layers"] if layer["name"] == "fc")
    assert head["neurons"] == 7
    first = saved["layers"][0]
    assert first["macs"] == 64 * 20 * 16 * 49
    assert saved["executed"] == saved["forward"] + saved["dgrad"] + saved["wgrad"]


def test_flops_layer_by_layer_is_aligned(neq):
    code, out, _ = neq("flops", "benchmarks.common.models:resnet20", "--size", "32", "--layers")
    assert code == 0
    header, *rows = out.splitlines()[1:41]
    assert header.split() == ["layer", "kind", "MACs", "share", "dgrad", "MACs", "wgrad", "MACs"]
    kind = header.index("kind")
    assert {row[kind : kind + 6].strip() for row in rows} == {"conv", "norm", "linear"}
    assert all(row[kind - 1] == " " for row in rows)


def test_options_reach_the_constructor(neq):
    arguments = ("flops", "deeplabv3_resnet50", "--size", "64", "--classes", "21", "--json")
    plain, auxiliary = (
        json.loads(neq(*arguments, *more)[1]) for more in ((), ("--option", "aux_loss=True"))
    )
    names = {layer["name"] for layer in auxiliary["layers"]}
    assert any(name.startswith("aux_classifier") for name in names)
    assert auxiliary["macs"] > plain["macs"]


def test_layers_that_do_not_run_are_reported(neq):
    _, out, _ = neq("flops", "googlenet", "--size", "64", "--option", "init_weights=False")
    assert "not called, not counted: aux1" in out


def test_models_of_the_current_folder_are_found(neq, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\ndef tiny():\n    return nn.Conv2d(3, 2, 1, bias=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    _, out, _ = neq("flops", "my_models:tiny", "--size", "4", "--json")
    assert json.loads(out)["macs"] == 2 * 16 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet181"], "did you mean resnet1"),
        (["timm:no_such_model"], "timm has none called 'no_such_model'"),
        (["no_such_package:model"], "no_such_package: cannot be imported"),
        (["resnet18", "--in-channels", "1"], "in_channels: torchvision's resnet18 takes 3, got 1"),
        (["resnet18", "--option", "no_such_option=1"], "no_such_option"),
        (["alexnet", "--size", "8"], "alexnet cannot run on a 1x3x8x8 batch"),
        (["torch.nn:ReLU"], "no convolution, linear or norm layer ran"),
        (["resnet18", "--size", "12x"], "argument --size: expected HxW or one number, got '12x'"),
        (["resnet18", "--classes", "0"], "argument --classes: expected a number above 0, got '0'"),
        (["resnet18", "--option", "aux"], "argument --option: expected NAME=VALUE, got 'aux'"),
        (["resnet18", "--convention", "published"], "invalid choice: 'published'"),
    ],
)
def test_mistakes_end_with_one_clear_line(neq, arguments, message):
    code, out, err = neq("flops", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_explain_converts_freezes_and_tells(neq):
    arguments = ("explain", "resnet18", "--size", "32", "--freeze", "0.5")
    code, out, _ = neq(*arguments)
    assert code == 0
    assert "MACs in neurons    100.0% of" in out
    assert "backprop           stops after layer2.1.bn2 (20 layers)" in out
    saved = json.loads(neq(*arguments, "--json")[1])
    assert saved["model"] == "resnet18"
    assert saved["backprop"]["stops_after"] == "layer2.1.bn2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn:ReLU"], "torch.nn:ReLU cannot be explained: model: expected at least one"),
        (["resnet18", "--freeze", "2"], "argument --freeze: expected a share above 0"),
    ],
)
def test_mistakes_in_explain(neq, arguments, message):
    code, _, err = neq("explain", *arguments)
    assert code == 2
    assert message in err


def test_help_and_version(neq):
    code, out, _ = neq("--help")
    assert code == 0
    assert "doctor" in out
    assert "flops" in out
    assert neq("--version")[1].startswith("neq ")
    assert neq()[0] == 2


def test_bench_times_every_distinct_layer(neq):
    arguments = ("bench", "benchmarks.common.models:resnet20", "--size", "8", "--batch", "2")
    code, out, _ = neq(*arguments, "--classes", "4", "--shares", "0.5", "--seconds", "0.001")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:]]
    layers = [row[0] for row in rows]
    assert {"conv1", "layer1.0.conv1", "layer3.0.conv1", "linear"} <= set(layers)
    assert len(layers) == len(set(layers))
    assert all(row[-1].endswith("x") for row in rows)


def test_bench_says_what_is_wrong(neq):
    code, _, err = neq("bench", "torchvision:alexnet", "--size", "3")
    assert code == cli.USER_ERROR
    assert "cannot be measured on a 8x3x3x3 batch" in err
    for share in ("0", "1.5", "half", "nan"):
        assert neq("bench", "torchvision:alexnet", "--shares", share)[0] == 2
