"""benchmarks.overheads.memory end to end, and the bytes it counts; no figure is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from benchmarks.common.records import load
from benchmarks.common.workloads import WORKLOADS, loss
from benchmarks.overheads import memory
from benchmarks.overheads.peak_memory import peak_bytes, peak_in_child, saved_bytes
from benchmarks.overheads.prefixes import (
    freeze_neurons,
    freeze_parameters,
    prefixes,
    run_without_grad,
)
from tests.support.step_workloads import BLOCKS

WORKLOAD = BLOCKS["blocks"]
MEBI = 2**20


def allocate(mebi: int):
    def work():
        torch.ones(mebi * MEBI // 4).sum()

    return work


def learning(model: nn.Module) -> set[str]:
    for parameter in model.parameters():
        parameter.grad = None
    loss(model, WORKLOAD.batches("nchw", 1)[0]).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_saved_bytes_are_distinct_activations():
    layer = nn.Linear(8, 16)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == 4 * 4 * 8
    y = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(layer, lambda: y * y * y[:, :4].sum()) == 4 * 4 * 8 * 2 + 4
    assert saved_bytes(layer, lambda: layer(x).exp()) == 4 * 4 * (8 + 16)


def test_peak_is_what_the_work_needs():
    peak = peak_bytes(allocate(64))
    assert peak is not None
    assert 60 * MEBI < peak < 120 * MEBI


def test_a_step_runs_in_a_child():
    (prefix,) = prefixes(WORKLOAD, [1.0])
    assert peak_in_child(memory.one_step, WORKLOAD, "neq", prefix) > 0


def test_prefixes_end_with_blocks():
    found = prefixes(WORKLOAD, (0.0, 0.4, 0.6, 1.0))
    assert [(p.end, len(p.layers), p.of) for p in found] == [
        ("", 0, 8),
        ("1", 3, 8),
        ("2", 5, 8),
        ("5", 7, 8),
    ]
    assert found[1].layers == ("0", "1.0", "1.1")


def test_the_real_prefixes():
    ends = [p.end for p in prefixes(WORKLOADS["resnet18"], memory.FRACTIONS)]
    assert ends == ["", "layer1.1", "layer2.1", "layer3.1", "avgpool"]


@pytest.mark.parametrize("fraction", memory.FRACTIONS)
def test_every_way_to_freeze_stops_the_same_parameters(fraction):
    (prefix,) = prefixes(WORKLOAD, [fraction])
    neurons = neq.convert(WORKLOAD.model("nchw"), others="follow")
    freeze_neurons(neurons, prefix)
    parameters, without_grad = WORKLOAD.model("nchw"), WORKLOAD.model("nchw")
    freeze_parameters(parameters, prefix)
    run_without_grad(without_grad, prefix)
    expected = learning(neurons)
    assert {name.rpartition(".")[0] for name in expected}.isdisjoint(prefix.layers)
    assert type(parameters[0]) is nn.Conv2d
    assert learning(parameters) == expected
    assert learning(without_grad) == expected
    assert torch.is_grad_enabled()


def test_rows_of_a_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "WORKLOADS", BLOCKS)
    monkeypatch.setattr(memory, "MODELS", tuple(BLOCKS))
    monkeypatch.setattr(memory, "peak_in_child", lambda prepare, *a: peak_bytes(prepare(*a)))
    arguments = ["--quick", "--models", "blocks", "--seconds", "0.01", "--out", str(tmp_path)]
    assert memory.main(arguments) == 0
    _, rows = load(tmp_path / "memory.jsonl")
    assert [(row["fraction"], row["provider"]) for row in rows] == [
        (0.0, "dense"),
        (0.0, "requires_grad"),
        (0.0, "neq"),
        (0.5, "requires_grad"),
        (0.5, "neq"),
    ]
    saved = {(row["fraction"], row["provider"]): row["saved_bytes"] for row in rows}
    assert saved[0.0, "neq"] == saved[0.0, "dense"]
    assert saved[0.5, "neq"] == saved[0.5, "requires_grad"] < saved[0.0, "dense"]
    assert all(row["peak_bytes"] >= 0 for row in rows)
    ratio = rows[-1]["time_ratio_median"]
    assert rows[-1]["passes_time"] == (ratio <= memory.MOST_TIME) or ratio == memory.MOST_TIME
    printed = capsys.readouterr().out
    assert "3 of 8" in printed
    assert "saved (<= 1.01 x requires_grad)" in printed


@pytest.mark.parametrize("arguments", [["--models", "no"], ["--seconds", "-1"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
