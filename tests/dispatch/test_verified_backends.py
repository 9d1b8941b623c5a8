"""Which backends serve a GPU by themselves: those that the self-check found right there."""

from __future__ import annotations

import json

import pytest
import torch

from neq_kernels.backends import cuda as module
from neq_kernels.dispatch import selection, tuning_table
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import runner
from neq_kernels.doctor.checks import OPS, Check
from tests.support.backends import cuda


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by name; nothing runs on it."""
    monkeypatch.setenv(tuning_table.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(selector.verified, "_outcomes", {})
    selector.forget()
    yield tmp_path
    monkeypatch.undo()
    selector.forget()


def checks(backend, device="cuda", wrong=()):
    return [Check(op, backend, device, 1, ("off",) if op in wrong else ()) for op in OPS]


@pytest.mark.parametrize(
    ("outcome", "right"),
    [
        (checks("cuda") + checks("triton"), ("cuda", "triton")),
        (checks("cuda", wrong=["conv_backward"]) + checks("triton"), ("triton",)),
        (checks("cuda")[:-1], ()),
        (checks("cuda", device="cpu"), ()),
        (checks("aten"), ()),
        ([], ()),
    ],
)
def test_a_backend_is_proved_by_every_op(gpu, outcome, right, monkeypatch):
    assert selector.verified.names() is None
    assert runner.prove(outcome) == right
    assert selector.verified.names() == right
    monkeypatch.setattr(selector.verified, "_outcomes", {})  # as in another process
    assert selector.verified.names() == right


def test_a_check_that_was_not_finished_proves_and_refutes_nothing(gpu):
    died = Check("the rest", doctor_checks.ANY, doctor_checks.ANY, 0, ("out of memory",))
    assert runner.prove([*checks("cuda"), died]) == ()
    assert selector.verified.names() is None


def test_what_cannot_be_written_holds_in_this_process(gpu, monkeypatch, caplog):
    (gpu / "file").write_text("")
    monkeypatch.setenv(tuning_table.DIRECTORY_VARIABLE, str(gpu / "file"))
    assert runner.prove(checks("cuda")) == ("cuda",)
    assert selector.verified.names() == ("cuda",)
    assert "is not saved" in caplog.text


def test_where_gpus_differ_nothing_is_proved(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"GPU {i}")
    assert runner.prove(checks("cuda")) == ()
    assert selector.verified.names() is None
    assert list(gpu.iterdir()) == []


def test_an_unserved_failure_is_no_failure_of_the_others(gpu, caplog):
    runner.prove(checks("cuda") + checks("aten", wrong=["linear_backward"]))
    assert selector.verified.names() == ("cuda",)
    assert "linear_backward of aten on cuda is wrong: off" in caplog.text


def test_a_proof_holds_for_one_gpu_version_and_build(gpu, monkeypatch):
    selector.verified.keep(["cuda"])
    others = (
        (torch.cuda, "get_device_name", lambda *_: "another GPU"),
        (torch, "__version__", "9.9"),
        (cuda, "build", lambda: "of today"),
    )
    for where, what, other in others:
        with monkeypatch.context() as m:
            m.setattr(where, what, other)
            assert selector.verified.names() is None
    assert selector.verified.names() == ("cuda",)


def test_a_build_is_known_by_its_bytes(tmp_path, monkeypatch):
    seen = []
    for text in ("a", "b", None):
        library = tmp_path / "_cuda.so"
        library.write_text(text) if text else library.unlink()
        monkeypatch.setattr(module, "LIBRARY", library)
        seen.append(cuda.build())
    assert len(set(seen)) == 3
    assert seen[2] == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checked_with": {}, "right": ["cuda"]}'])
def test_a_file_that_says_something_else_is_ignored(gpu, caplog, text):
    selector.verified.keep(["cuda"])
    selector.verified._outcomes.clear()
    (path,) = gpu.glob("selfcheck-*.json")
    assert json.loads(path.read_text())["right"] == ["cuda"]
    path.write_text(text)
    assert selector.verified.names() is None
    assert "is ignored" in caplog.text


def test_without_a_gpu_nothing_is_proved():
    assert selector.verified.names() is None


def test_what_is_proved_serves_from_then_on(gpu, monkeypatch):
    monkeypatch.delenv(selection.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(selector, "why_not", lambda backend, device: None)
    assert selector.backends_for("cuda") == ("aten",)
    runner.prove(checks("cuda"))
    assert selector.backends_for("cuda") == ("cuda", "aten")
