"""Which backend serves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from neq_kernels import functional
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.channels import Active
from neq_kernels.dispatch import backward, cost_model, selection
from neq_kernels.dispatch.selection import selector
from tests.support import oracle
from tests.support.backends import aten, cpu, cuda, triton


def test_the_extension_is_built():
    """Without it the suite would test less than it says. NEQ_KERNELS_BACKEND=aten says so on
    purpose."""
    reason = cpu.unavailable()
    chosen = os.environ.get(selection.ENVIRONMENT_VARIABLE)
    assert reason is None or chosen == "aten", reason


def test_the_best_usable_backend_serves(monkeypatch):
    monkeypatch.delenv(selection.ENVIRONMENT_VARIABLE, raising=False)
    selector.forget()
    assert selector.backends_for("cpu")[0] == ("cpu" if cpu.unavailable() is None else "aten")
    assert selector.backends_for("meta")[0] == "aten"
    selector.forget()


def test_a_missing_extension_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv(selection.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is missing on purpose")
    selector.forget()
    for _ in range(3):
        assert selector.backends_for("cpu")[0] == "aten"
    selector.forget()
    assert [r.message for r in caplog.records] == [
        "backend cpu is not used for cpu tensors: it is missing on purpose"
    ]


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is missing on purpose")
    with oracle.forced_backend("cpu"), pytest.raises(RuntimeError, match="missing on purpose"):
        selector.backends_for("cpu")[0]
    monkeypatch.undo()
    with oracle.forced_backend("cpu"), pytest.raises(RuntimeError, match=r"got meta|not built"):
        selector.backends_for("meta")[0]
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    with oracle.forced_backend("triton"), pytest.raises(RuntimeError, match="GPU tensors, got cpu"):
        selector.backends_for("cpu")[0]
    monkeypatch.undo()
    with oracle.forced_backend("cudnn"), pytest.raises(ValueError, match="got 'cudnn'"):
        selector.backends_for("cpu")[0]


def test_a_gpu_is_served_by_what_was_proved_on_it(monkeypatch):
    monkeypatch.delenv(selection.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda: "it is missing on purpose")
    for proved, expected in (
        (None, ("aten",)),
        ((), ("aten",)),
        (("cuda", "triton"), ("cuda", "aten")),
        (("triton",), ("aten",)),
    ):
        monkeypatch.setattr(selector.verified, "names", lambda proved=proved: proved)
        selector.forget()
        assert selector.backends_for("cuda") == expected
        assert selector.backends_for("cuda")[0] == expected[0]
        assert selector.context("cuda").backends == expected
        assert selector.backends_for("meta") == ("aten",)
    selector.forget()


OVERRUN = """
import sys
import torch
import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector

torch.set_num_threads(1)
last = {"memory_format": torch.channels_last}
transposed = sys.argv[1] == "transposed"
channels = neq.ActiveChannels(8)
channels.set([1, 2])
weight = torch.randn(8, 8 if transposed else 4, 1, 1).contiguous(**last).requires_grad_()
arguments = {"transposed": True, "output_padding": 1} if transposed else {"groups": 2}
with selector.forced_strategy(Strategy.PACK):
    for _ in range(300):
        x = torch.randn(3, 8, 10, 10).contiguous(**last)
        neq.functional.conv(x, weight, None, channels, stride=2, **arguments).sum().backward()
"""


@pytest.mark.parametrize("kind", ["grouped", "transposed"])
@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_packing_makes_no_convolution_that_corrupts_the_heap(backend, kind):
    """As a plain convolution the only live group, 4 input channels, aborts in oneDNN; a transposed
    one does with 4 packed output channels."""
    environment = os.environ | {selection.ENVIRONMENT_VARIABLE: backend}
    command = [sys.executable, "-c", OVERRUN, kind]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("inputs", "n", "expected"),
    [
        (4096, 400, Strategy.PACK),
        (4096, 2048, Strategy.PACK),
        (4096, 3900, Strategy.DENSE),
        (128, 1024, Strategy.PACK),
        (128, 2048, Strategy.DENSE),
        (16, 400, Strategy.DENSE),
        (16, 8, Strategy.CUSTOM),
    ],
)
def test_a_gpu_packs_where_that_moves_less_than_it_spares(inputs, n, expected):
    problem = Problem((8192, inputs), (4096, inputs), None, False, torch.bfloat16)
    assert cost_model.strategy_on_gpu(problem, n, tuple(Strategy)) == expected


@pytest.mark.parametrize(("groups", "expected"), [(1, Strategy.PACK), (2, Strategy.DENSE)])
def test_off_the_cpu_the_channels_of_groups_are_not_counted_to_pack_them(
    groups, expected, monkeypatch
):
    """That would wait for the GPU. Here in its place: tensors without data."""
    used = []
    monkeypatch.setattr(selector, "backends_for", lambda device_type: ("aten",))
    monkeypatch.setattr(
        aten,
        "conv_backward",
        lambda *_, choice, **more: (used.append(choice.strategy), [None] * 3)[1],
    )
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
    x, dy = (torch.empty(2, 8, 5, 5, device="meta") for _ in range(2))
    weight = torch.empty(8, 8 // groups, 3, 3, device="meta")
    active = Active(torch.arange(8), torch.tensor([2]), 2, -1)
    with selector.forced_strategy(Strategy.PACK):
        backward.conv_backward(dy, x, x.shape, weight, geometry, active, [True] * 3, False)
    assert used == [expected]


@pytest.mark.parametrize("name", ["aten", "cpu"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_bias_alone_packs_nothing(name, groups, monkeypatch):
    """No channel of the input, which was not saved, nor of the output's gradient."""

    def packs(*_):
        raise AssertionError("packed")

    for backend in (aten, cpu):
        monkeypatch.setattr(backend, "pack", packs)
    channels = oracle.channels_with([True, False] * 4)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    weight, bias = torch.randn(8, 8 // groups, 3, 3), torch.zeros(8, requires_grad=True)
    with oracle.forced_backend(name), selector.forced_strategy(Strategy.PACK):
        out = functional.conv(x, weight, bias, channels, groups=groups)
        dy = torch.randn_like(out)
        out.backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)) * channels.mask)
