"""benchmarks.overheads.controller end to end, and the bytes it counts; no figure is judged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import neq_kernels as neq
from benchmarks.common.records import load
from benchmarks.common.workloads import WORKLOADS
from benchmarks.overheads import controller
from benchmarks.overheads.peak_memory import peak_allocated
from tests.support.step_workloads import BLOCKS

MEBI = 2**20


def test_peak_allocated_counts_what_is_live_together():
    def work():
        a = torch.ones(MEBI)
        b = a + 1
        del a
        c = torch.ones(2 * MEBI)
        del b
        (c * 2).sum()

    assert peak_allocated(work) == pytest.approx(16 * MEBI, rel=0.01)
    assert peak_allocated(lambda: None) == 0


def test_output_bytes_are_those_of_converted_layers():
    model = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert controller.output_bytes(model, torch.randn(3, 4)) == 4 * 3 * (8 + 2)


def test_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controller, "WORKLOADS", BLOCKS)
    monkeypatch.setattr(controller, "MODEL", "blocks")
    assert controller.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    header, rows = load(tmp_path / "controller.jsonl")
    assert header["settings"]["epoch"] == "50000 images in batches of 4"
    assert [row["layout"] for row in rows] == ["nchw", "nhwc"]
    for row in rows:
        assert row["epoch"] == "12500 x the median step"
        assert row["epoch_seconds"] == pytest.approx(
            12_500 * row["step_seconds_median"],
            rel=1e-3,  # records keep four digits
        )
        share = row["controller_seconds_median"] / row["epoch_seconds"]
        assert row["share_of_epoch"] == pytest.approx(share, rel=2e-3)
        assert row["passes_time"] == (share <= 0.01)
        assert row["kept_bytes"] == row["model_bytes"]
        assert row["peak_step_bytes"] > row["output_bytes"]
    printed = capsys.readouterr().out
    assert "time (<= 1% of an epoch)" in printed


def test_an_epoch_of_the_real_case_has_391_steps():
    clock = controller.PhaseClock()
    clock.samples = {phase: [1.0] for phase in controller.PHASES} | {"controller": [11.73]}
    steps = math.ceil(controller.EPOCH_IMAGES / WORKLOADS[controller.MODEL].images)
    row = controller._time(clock, steps)
    assert row["epoch"] == "391 x the median step"
    assert row["share_of_epoch"] == pytest.approx(0.01)


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        controller.main(["--rounds", "0"])
    assert stopped.value.code == 2
    assert "--rounds" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert controller.main(["--out", str(tmp_path / "file")]) == 2
