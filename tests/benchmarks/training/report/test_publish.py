from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from benchmarks.training.report import publish

SUMMARY = {
    "machine": {
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
    lines = publish.readme_block(SUMMARY).splitlines()
    assert "| From scratch | dense | 70.0% | 100.0 | 0.0% | 0.0% |  |  |  |" in lines
    assert (
        "| From scratch | neq | 71.0% | 90.0 | 25.0% | 50.0% | 1.051 (1.100) | 1.200 (1.250) "
        "| -0.4 of 20.0 |" in lines
    )
    assert any("some processor, 2 threads, PyTorch 2.14.1" in line for line in lines)


def test_only_the_block_is_replaced() -> None:
    readme = f"before\n{publish.BEGIN}old\n{publish.END}after\n"
    assert publish.with_block(readme, "new\n") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="expected the lines"):
        publish.with_block("no markers", "new\n")


def test_every_figure_of_the_readme_comes_from_the_committed_results() -> None:
    summary = json.loads((publish.RESULTS / "summary.json").read_text())
    readme = publish.README.read_text()
    assert publish.with_block(readme, publish.readme_block(summary)) == readme
    rows = list(csv.DictReader((publish.RESULTS / "summary.csv").open()))
    assert [row["run"] for row in rows] == [run["run"] for run in summary["runs"]]
    for row, run in zip(rows, summary["runs"], strict=True):
        assert float(row["step_ms"]) == run["step_ms"]
    for name in publish.FILES:
        assert (publish.RESULTS / name).is_file()


def test_pictures_and_links_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", publish.README.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert all((publish.ROOT / target).exists() for target in local)


def test_unfinished_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main([str(tmp_path)]) == 2
    assert "expected a finished demo, lacks summary.csv" in capsys.readouterr().err
