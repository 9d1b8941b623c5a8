"""Which backends serve a GPU by themselves: those that the self-check found right there."""

from __future__ import annotations

import json

import pytest
import torch

from neq_kernels import dispatch, proofs, selfcheck, tuning
from neq_kernels.selfcheck import OPS, Check


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by name; nothing runs on it."""
    monkeypatch.setenv(tuning.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    proofs._about.cache_clear()
    dispatch.backends_for.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    proofs._about.cache_clear()
    dispatch.backends_for.cache_clear()


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
        ([*checks("cuda"), Check("the rest", "any", "any", 0, ("died",))], ()),
        ([], ()),
    ],
)
def test_a_backend_is_proved_by_every_op(gpu, outcome, right):
    assert proofs.proved() is None
    assert selfcheck.prove(outcome) == right
    assert proofs.proved() == right


def test_an_unserved_failure_is_no_failure_of_the_others(gpu, caplog):
    selfcheck.prove(checks("cuda") + checks("aten", wrong=["linear_backward"]))
    assert proofs.proved() == ("cuda",)
    assert "linear_backward of aten on cuda is wrong: off" in caplog.text


def test_a_proof_holds_for_one_gpu_and_version(gpu, monkeypatch):
    proofs.keep(["cuda"])
    for what, other in (("get_device_name", "another GPU"), (None, "9.9")):
        with monkeypatch.context() as m:
            if what:
                m.setattr(torch.cuda, what, lambda *_, other=other: other)
            else:
                m.setattr(torch, "__version__", other)
            proofs._about.cache_clear()
            assert proofs.proved() is None
    proofs._about.cache_clear()
    assert proofs.proved() == ("cuda",)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checked_with": {}, "right": ["cuda"]}'])
def test_a_file_that_says_something_else_is_ignored(gpu, caplog, text):
    proofs.keep(["cuda"])
    (path,) = gpu.glob("selfcheck-*.json")
    assert json.loads(path.read_text())["right"] == ["cuda"]
    path.write_text(text)
    assert proofs.proved() is None
    assert "is ignored" in caplog.text


def test_without_a_gpu_nothing_is_proved():
    assert proofs.proved() is None


def test_what_is_proved_serves_from_then_on(gpu, monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: None)
    assert dispatch.backends_for("cuda") == ("aten",)
    selfcheck.prove(checks("cuda"))
    assert dispatch.backends_for("cuda") == ("cuda", "aten")
