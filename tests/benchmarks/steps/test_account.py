"""Where a cell's time goes: nothing is counted twice, and a slow layer is found."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.common.records import load, load_csv
from benchmarks.steps import account, cpu
from neq_kernels.measure import bandwidth
from tests.support.step_workloads import TINY

OPTIONS = cpu.StepOptions("sgd", 0.01, 2, 6)
HALF = replace(TINY["tiny"], autocast=torch.bfloat16)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(account, "ROUNDS", 5)
    monkeypatch.setattr(cpu, "WORKLOADS", TINY)
    monkeypatch.setattr(cpu, "BF16_WORKLOADS", {"tiny": HALF})


@pytest.mark.parametrize(
    ("layout", "dtype"), [("nhwc", "float32"), ("nhwc", "bfloat16"), ("nchw", "float32")]
)
def test_every_layer_and_what_it_moves(tmp_path, capsys, layout, dtype):
    arguments = ["--out", str(tmp_path), "--account", "tiny", layout, "0.5", dtype]
    assert cpu.main(arguments) == 0
    name = account.name_of("tiny", layout, dtype, 0.5)
    assert f"{name}.csv" in capsys.readouterr().out
    header, rows = load(tmp_path / f"{name}.jsonl")
    assert header["settings"] == {"model": "tiny", "layout": layout, "dtype": dtype, "r": 0.5}
    assert [str(row["layer"]) for row in load_csv(tmp_path / f"{name}.csv")[1]] == [
        row["layer"] for row in rows
    ]
    *layers, optimizer, rest, whole = rows
    assert [row["layer"] for row in layers] == ["0", "1", "3", "4", "8"]
    assert [row["kind"] for row in layers] == ["product", "norm", *["product"] * 3]
    first = layers[0]
    assert (first["active"], first["channels"]) == (4, 8)
    item = 4 if dtype == "float32" else 2
    assert first["input_bytes"] == 4 * 3 * 8 * 8 * item
    # A line holds all 8 channels of two pixels or more.
    touched = 8 if layout == "nhwc" else 4
    assert first["active_grad_output_bytes"] == 4 * touched * 8 * 8 * item
    assert first["grad_weight_bytes"] == 8 * 3 * 3 * 3 * 4
    for row in layers:
        if row["kind"] == "product":
            assert row["strategy"] in ("dense", "pack", "custom")
            reads = row["input_bytes"] + row["active_grad_output_bytes"]
            floor = reads / whole["read_bandwidth"]
            floor += row["grad_weight_bytes"] / whole["write_bandwidth"]
            assert row["floor_us"] == pytest.approx(1e6 * floor, rel=1e-2)
            dense = row["dense_us"]
            allowed = min(max(dense * row["active"] / row["channels"], 1e6 * floor), dense)
            assert row["allowed_us"] == pytest.approx(allowed, rel=1e-2, abs=0.1)
    parts = [*layers, optimizer, rest]
    assert sum(row["miss_us"] for row in parts) == pytest.approx(whole["miss_us"], rel=0.02, abs=1)
    assert sum(row["share_of_miss"] for row in parts) == pytest.approx(1, rel=0.02)


def test_a_slow_layer_is_found():
    one = account.Account(TINY["tiny"], "nchw", 0.5, OPTIONS)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.1)
            return grad

    forward = one._ours[4].forward
    one._ours[4].forward = lambda x: forward(Slow.apply(x))
    rows = {row["layer"]: row for row in one.rows()}
    assert rows["4"]["neq_us"] > 100_000
    assert rows["4"]["miss_us"] == max(rows[name]["miss_us"] for name in "01348")
    assert rows["4"]["share_of_miss"] > 0.5


def test_nodes_of_a_layer_end_at_its_input():
    layer = nn.Linear(4, 4)
    below = torch.randn(2, 3, 4, requires_grad=True).transpose(0, 1) * 1
    names = [node.name() for node in account._nodes(layer(below), (below,))]
    assert "MmBackward0" in names
    assert not {"MulBackward0", "torch::autograd::AccumulateGrad"} & set(names)


def test_what_cannot_be_accounted_for_is_refused(tmp_path, capsys):
    for cell in (["tiny", "nchw", "0"], ["no", "nchw", "1"], ["tiny", "any", "1"], ["tiny"]):
        assert cpu.main(["--out", str(tmp_path), "--account", *cell]) == 2
        assert "--account: expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
