from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import by_class
from benchmarks.training.report import publish

SUMMARY = {
    "machine": {
        "cpu_class": "x86-avx2",
        "cpu": "some processor",
        "threads": 2,
        "torch": "2.14.1",
        "date": "2026-11-22T12:00:00+00:00",
    },
    "runs": [
        {
            "scene": "From scratch",
            "run": "dense",
            "test_accuracy": 0.7,
            "step_ms": 100.04,
            "frozen_mean": 0.0,
            "frozen_last_epoch": 0.0,
        },
        {
            "scene": "From scratch",
            "run": "neq",
            "test_accuracy": 0.71,
            "step_ms": 90.0,
            "frozen_mean": 0.25,
            "frozen_last_epoch": 0.5,
            "speedup_mean": 1.0511,
            "bound_mean": 1.0999,
            "speedup_last_epoch": 1.2,
            "bound_last_epoch": 1.25,
            "saved_seconds": -0.44,
            "dense_step_seconds": 20.0,
        },
    ],
}


def test_block_holds_the_figures_of_the_summary() -> None:
    lines = publish.block_text(SUMMARY, publish.DEMO / "x86-avx2").splitlines()
    assert "| From scratch | dense | 70.0% | 100.0 | 0.0% | 0.0% |  |  |  |" in lines
    assert (
        "| From scratch | neq | 71.0% | 90.0 | 25.0% | 50.0% | 1.051 (1.100) | 1.200 (1.250) "
        "| -0.4 of 20.0 |" in lines
    )
    assert any("some processor, 2 threads, PyTorch 2.14.1" in line for line in lines)


@pytest.mark.parametrize("folder", by_class.folders(publish.DEMO).values(), ids=lambda f: f.name)
def test_the_committed_tables_are_of_one_demo(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["run"] for row in rows] == [run["run"] for run in summary["runs"]]
    for row, run in zip(rows, summary["runs"], strict=True):
        assert float(row["step_ms"]) == run["step_ms"]
    for name in publish.FILES:
        assert (folder / name).is_file()


def test_a_demo_is_copied_and_the_block_written_from_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = replace(publish.BLOCK, page=tmp_path / "page.md")
    block.page.write_text(f"before\n{block.begin}old\n{block.end}after\n")
    demo, results = tmp_path / "demo", tmp_path / "results"
    shutil.copytree(publish.DEMO / "x86-avx2", demo)
    (demo / "summary.json").write_text(json.dumps(SUMMARY))
    monkeypatch.setattr(publish, "BLOCK", block)
    monkeypatch.setattr(publish, "DEMO", results)
    monkeypatch.setattr(by_class, "cpu_class", lambda: "x86-avx2")
    assert publish.main([str(demo)]) == 0
    folder = results / "x86-avx2"
    assert [path.name for path in results.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == sorted(publish.FILES)
    assert publish.block_text(SUMMARY, folder) in block.text()
    assert "(results/x86-avx2/step_time.png)" in block.text()
    first = block.page.read_bytes()
    assert publish.main([str(folder)]) == 0  # what is published can be published again
    assert block.page.read_bytes() == first


def test_unfinished_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main([str(tmp_path)]) == 2
    assert "expected a finished demo, lacks summary.csv" in capsys.readouterr().err
