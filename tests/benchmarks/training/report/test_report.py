from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training.report import __main__, report
from benchmarks.training.report.report import Scene, summary_row
from benchmarks.training.report.results import Comparison, Result

MACHINE = {
    "cpu": "a <processor>",
    "cores": 2,
    "threads": 2,
    "instructions": "AVX2",
    "accelerator": None,
    "system": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.14.1",
    "date": "2026-11-22T12:00:00+00:00",
}
SETTINGS = {"policy": "dense", "model": "m", "data": "d", "optimizer": "sgd", "lr": 0.1}
SETTINGS |= {"schedule": "cosine", "epochs": 2, "batch": 10, "seed": 0}


def epoch(number: int, step_ms: float, frozen: float = 0.0, **more: Any) -> dict[str, Any]:
    third = [step_ms / 3] * 3
    return {
        "epoch": number,
        "lr": 0.1,
        "steps": 100,
        "images": 1000,
        "active": {"conv": [4, 8], "fc": [2, 2]} if frozen else {},
        "frozen": frozen,
        "flops": {"paper": 2e6 * (1 - frozen), "forward": 2e6, "dgrad": 1e6, "wgrad": 2e6},
        "test_accuracy": 0.5 + number / 10,
        "seconds": dict.fromkeys(("data", "forward", "backward", "optimizer", "eval"), 1.0)
        | {"controller": 0.25 if frozen else 0.0},
        "step_ms": {"step": [step_ms * 0.9, step_ms, step_ms * 1.2]}
        | dict.fromkeys(("data", "forward", "backward", "optimizer"), third),
        "joules": None,
        "joules_source": "no energy counter on this machine",
        **more,
    }


def result(policy: str, epochs: list[dict[str, Any]]) -> Result:
    return Result(policy, SETTINGS | {"policy": policy}, MACHINE, epochs, {"wgrad": 0.3})


@pytest.fixture
def scene() -> Scene:
    dense = result("dense", [epoch(0, 100), epoch(1, 110)])
    neq = result("neq", [epoch(0, 100, 0.5, bound=1.25), epoch(1, 88, 0.5, bound=1.375)])
    return Scene("Scene <1>", "Some text.", [dense, neq])


def test_savings_by_hand(scene: Scene) -> None:
    pair = Comparison(scene.results[1], scene.results[0])
    assert pair.speedup(1) == pytest.approx(110 / 88)
    assert pair.saved_in_steps() == pytest.approx(100 * (0 + 22) / 1e3)
    assert pair.saved() == pytest.approx(2.2 - 0.5)
    assert pair.mean_speedup() == pytest.approx(210 / 188)
    assert pair.mean_bound() == pytest.approx(210 / (100 / 1.25 + 110 / 1.375))
    row = summary_row(scene, scene.results[1])
    assert row["saved_share"] == pytest.approx(1.7 / 21)
    assert row["flops_paper_millions"] == pytest.approx(1)
    assert row["flops_executed_millions"] == pytest.approx(5)
    assert row["energy"] == "no energy counter on this machine"
    assert row["joules"] is None
    assert "saved_seconds" not in summary_row(scene, scene.results[0])


def test_an_interrupted_run_is_not_compared_as_a_whole(scene: Scene) -> None:
    short = result("dense", scene.results[0].epochs[:1])
    row = summary_row(Scene("s", "", [short, scene.results[1]]), scene.results[1])
    assert "saved_seconds" not in row


def test_unknown_bound_stays_unknown(scene: Scene) -> None:
    unprofiled = result("neq", [epoch(0, 100, 0.5), epoch(1, 88, 0.5)])
    row = summary_row(Scene("s", "", [scene.results[0], unprofiled]), unprofiled)
    assert row["bound_mean"] is None
    assert row["bound_last_epoch"] is None


def test_counted_joules_are_shown_with_their_source(scene: Scene) -> None:
    counted = [epoch(i, 100, joules=20.5, joules_source="RAPL package-0") for i in range(2)]
    row = summary_row(scene, result("dense", counted))
    assert row["joules"] == 41.0
    assert row["energy"] == "41 J (RAPL package-0)"


class Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_says_what_the_files_say(scene: Scene, tmp_path: Path) -> None:
    report.write_comparison(tmp_path, "A & B", "<p>Lead.</p>", [scene])
    text = (tmp_path / "report.html").read_text()
    parser = Images()
    parser.feed(text)
    assert not parser.open
    assert len(parser.sources) == 4
    for source in parser.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=.?https?:|@import|url\(", text)
    for expected in (
        "A &amp; B",
        "Scene &lt;1&gt;",
        "a &lt;processor&gt;",
        "no energy counter on this machine",
        "froze 50.0% of the network",
        "it saved 1.7 s (+8.1%), its controller's 0.5 s counted in",
        "<td>+1.70</td>",
        "<td>30.0%</td>",
    ):
        assert expected in text, expected

    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["run"] for row in rows] == ["dense", "neq"]
    assert float(rows[1]["saved_seconds"]) == pytest.approx(1.7)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"] == MACHINE
    assert summary["runs"][1]["bound_last_epoch"] == 1.375


def test_loss_of_time_is_called_a_loss(scene: Scene) -> None:
    slow = result("neq", [epoch(i, 120, 0.01, bound=1.003) for i in range(2)])
    (words,) = report.verdicts(Scene("s", "", [scene.results[0], slow]))
    assert "lost 3.5 s (-16.7%)" in words
    assert "allow 0.3% at best" in words
    assert "near zero: a short run freezes late" in words


def test_comparison_command(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.training.run_folder import RunFolder

    for found in scene.results:
        folder = RunFolder(tmp_path / found.name)
        folder.create({"settings": dict(found.settings), "machine": MACHINE})
        folder.write_json("profile.json", {"wgrad": 0.3})
        for record in found.epochs:
            folder.append_metrics(record)
    out = tmp_path / "both"
    paths = [str(tmp_path / "dense"), str(tmp_path / "neq")]
    assert __main__.main([*paths, "--out", str(out)]) == 0
    assert "saved 1.7 s" in (out / "report.html").read_text()
    assert __main__.main([str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "there is no run to read here" in capsys.readouterr().err


def test_ratios_of_steps_taken_in_turn_come_before_ratios_of_medians(scene: Scene) -> None:
    dense = scene.results[0]
    paired = [epoch(i, 100, 0.5, bound=1.5, speedup=[1.1, 1.25, 1.3]) for i in range(2)]
    pair = Comparison(result("neq", paired), dense)
    assert pair.speedup(0) == 1.25
    assert pair.saved_in_steps() == pytest.approx(100 * (100 + 110) * (1 - 1 / 1.25) / 1e3)
    assert pair.mean_speedup() == pytest.approx(1.25)
