"""The list, the children, the table and its page; and twelve models of the list."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import _api

from benchmarks.common.records import load_csv
from benchmarks.zoo import __main__ as command
from benchmarks.zoo import building, children, page, summary
from benchmarks.zoo.checks import CHECKS, Example, check
from benchmarks.zoo.entries import Entry, chosen, entries

ALL = entries()
CI = [entry for entry in ALL if entry.in_ci]


@pytest.mark.parametrize("entry", CI, ids=lambda entry: entry.name)
def test_models_of_the_list_are_as_in_the_table(entry: Entry) -> None:
    known = {f"{row['library']}/{row['name']}": row for row in load_csv(page.TABLE)[1]}[entry.id]
    row = check(lambda: building.build(entry))
    assert [row[name] for name in CHECKS] == [known[name] for name in CHECKS], row
    assert row["mac_share"] == pytest.approx(known["mac_share"], abs=1e-3)


def test_ci_runs_twelve_models_of_every_library() -> None:
    assert len(CI) == 12
    assert {entry.library for entry in CI} == {entry.library for entry in ALL}


def test_no_family_is_left_out() -> None:
    torchvision = {
        build.__module__.removeprefix("torchvision.models.")
        for build in _api.BUILTIN_MODELS.values()
    }
    for library, families in (("torchvision", torchvision), ("timm", set(timm.list_modules()))):
        assert {entry.family for entry in ALL if entry.library == library} == {
            family for family in families if library != "timm" or timm.list_models(module=family)
        }
    assert len({entry.family for entry in ALL if entry.library == "transformers"}) >= 60


def listed(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text)
    return path


def test_a_line_is_read(tmp_path: Path) -> None:
    text = '# a comment\n[some kind]\ntimm vgg vgg11 3x64x64 a.b=[1,2] a.c="x" d=true ci # why\n'
    options = {"a": {"b": [1, 2], "c": "x"}, "d": True}
    assert entries(listed(tmp_path, text)) == [
        Entry("timm", "vgg", "vgg11", "3x64x64", options, True, "some kind")
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keras vgg vgg11 3x64x64", "list.txt:1: expected 'LIBRARY FAMILY NAME INPUT"),
        ("timm vgg vgg11", "list.txt:1: expected 'LIBRARY FAMILY NAME INPUT"),
        ("\ntimm vgg vgg11 3x64x64 depth", "list.txt:2: expected KEY=VALUE"),
        ("timm a x 1x1\ntimm b x 1x1", r"expected each model once, got \['timm/x'\] again"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        entries(listed(tmp_path, text))


def test_models_are_chosen_by_name_family_library_and_id() -> None:
    for name in ("resnet18", "torchvision/resnet18"):
        assert {entry.name for entry in chosen([name], False, ALL)} == {"resnet18"}
    assert {entry.library for entry in chosen(["timm"], False, ALL)} == {"timm"}
    assert {"resnet18", "resnet50"} <= {entry.name for entry in chosen(["resnet"], False, ALL)}
    assert chosen(None, True, ALL) == CI
    with pytest.raises(ValueError, match=r"--only: .*got \['resnet17'\]"):
        chosen(["resnet17", "resnet18"], False, ALL)


def tiny(library: str, name: str) -> Entry:
    return Entry(library, "tiny", name, "4", {}, section="nets")


def build_or_fail(entry: Entry) -> Example:
    if entry.name == "crash":
        os.abort()
    if entry.name == "hang":
        time.sleep(60)
    return Example(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),))


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    monkeypatch.setattr(building, "build", build_or_fail)
    found = [tiny("torchvision", name) for name in ("one", "crash", "hang", "two")]
    monkeypatch.setattr(command, "entries", lambda: found)
    return found


def test_a_crash_and_a_hang_are_rows(tiny_models: list[Entry]) -> None:
    rows: dict[str, Any] = {e.name: row for e, row in children.rows(tiny_models, 2, 5.0)}
    assert rows["one"]["forward"]
    assert rows["two"]["forward"]
    assert rows["crash"]["reason"] == "crashed: SIGABRT"
    assert rows["hang"]["reason"] == "no end within 5 s"
    assert summary.is_wrong({"reason": "crashed"})


def test_a_sweep_goes_on_where_it_was(
    tiny_models: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "zoo.csv")]
    assert command.main(["--only", "two", *out]) == 0
    assert "torchvision/two" in capsys.readouterr().out
    assert command.main(["--only", "one", "two", *out]) == 0
    said = capsys.readouterr().out
    assert "torchvision/one" in said
    assert "torchvision/two" not in said
    assert "2 models, 2 of them built" in said
    assert command.main(["--only", "two", "--again", *out]) == 0
    assert "torchvision/two" in capsys.readouterr().out
    rows = load_csv(tmp_path / "zoo.csv")[1]
    assert [row["name"] for row in rows] == ["one", "two"]
    assert rows[0]["stop"] is True
    assert rows[0]["mac_share"] == 1
    assert command.main(["--only", "crash", *out]) == 1
    assert command.main(["--only", "three", *out]) == 2


def test_goals_count_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dict.fromkeys(summary.RESULTS, True) | {"built": True, "mac_share": 0.96, "stop": True}
    rows = [
        right,
        right | {"mac_share": 0.9, "stop": False},
        right | {"sgd": False},
        {"built": False, "reason": "not built"},
        {"reason": "crashed"},
    ]
    counts = {goal.name: goal.count(rows) for goal in summary.GOALS}
    assert list(counts.values()) == [(2, 4), (2, 3), (3, 3), (2, 3)]
    assert [summary.is_exception(row) for row in rows] == [False, True, True, True, True]
    assert [goal.line(rows)[3] for goal in summary.GOALS] == [False, False, True, False]


def test_the_page_is_made_of_the_table() -> None:
    header, rows = load_csv(page.TABLE)
    assert {f"{row['library']}/{row['name']}" for row in rows} <= {entry.id for entry in ALL}
    assert {entry.id for entry in CI} <= {f"{row['library']}/{row['name']}" for row in rows}
    assert page.BLOCK.text() == page.published()
    assert header["command"] == page.BLOCK.command.removesuffix(" --publish")


def test_a_page_needs_a_row_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = replace(page.BLOCK, page=tmp_path / "page.md")
    block.page.write_text(block.begin + block.end)
    monkeypatch.setattr(page, "BLOCK", block)
    page.publish(ALL)
    assert block.text() == page.published()
    with pytest.raises(ValueError, match=r"a row of every model, got none of \['timm/new'\]"):
        page.publish([*ALL, tiny("timm", "new")])
