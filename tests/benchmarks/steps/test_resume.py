"""A record of steps goes on where it stopped, and only with what is of its kind."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.records import load
from benchmarks.steps import cpu, resume
from neq_kernels.measure import bandwidth
from tests.support.step_workloads import TINY

FAST = ["--seconds", "0.01", "--rounds", "6", "--layouts", "nchw", "--quick"]


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch):
    monkeypatch.setattr(cpu, "WORKLOADS", TINY)
    monkeypatch.setattr(cpu, "BF16_WORKLOADS", {})
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**16)


@pytest.fixture
def measured(monkeypatch):
    """The cells that are measured from now on."""
    shares = []
    rows = cpu.Contest.rows

    def noted(self, r):
        shares.append(r)
        return rows(self, r)

    monkeypatch.setattr(cpu.Contest, "rows", noted)
    return shares


def run(folder, *shares, more=()):
    assert cpu.main(["--out", str(folder), *FAST, "--r", *shares, *more]) == 0
    return load(folder / "step.jsonl")


def cells(rows):
    return [row["r"] for row in rows if row["provider"] == "neq"]


def test_an_interrupted_run_goes_on(tmp_path, measured, capsys, monkeypatch):
    add = cpu.Record.add

    def killed(self, row):
        add(self, row)
        if len(self.rows) == 4:  # in the midst of the second cell
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cpu.Record, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            cpu.main(["--out", str(tmp_path), *FAST, "--r", "1", "0.5", "0.25"])
    path = tmp_path / "step.jsonl"
    first = load(path)[1]
    path.write_text(path.read_text() + '{"model": "ti')  # and a line that was never ended
    measured.clear()
    _, rows = run(tmp_path, "1", "0.5", "0.25")
    assert measured == [0.5, 0.25]
    assert cells(rows) == [1.0, 0.5, 0.25]
    assert len(rows) == 9
    assert rows[:3] == first[:3]
    assert f"{path}: 1 cells kept" in capsys.readouterr().out
    assert load(path)[1] == rows


def test_cells_join_those_that_are_there_in_order(tmp_path, measured, capsys):
    run(tmp_path, "0.5")
    header, rows = run(tmp_path, "1")
    assert cells(rows) == [1.0, 0.5]
    assert measured == [0.5, 1.0]
    assert " && " not in header["command"]  # pytest's own, twice
    before = rows
    _, rows = run(tmp_path, "1", "0.5")
    assert rows == before
    assert "nothing left to measure" in capsys.readouterr().out
    _, rows = run(tmp_path, "1", more=["--again"])
    assert measured == [0.5, 1.0, 1.0]
    assert rows[3:] == before[3:]
    assert rows[:3] != before[:3]


@pytest.mark.parametrize("other", ["machine", "settings", "code", "no record"])
def test_what_is_of_another_kind_is_not_kept(tmp_path, measured, capsys, other):
    run(tmp_path, "1")
    path = tmp_path / "step.jsonl"
    header, *rows = map(json.loads, path.read_text().splitlines())
    if other == "machine":
        header["machine"]["cpu"] = "Another"
    elif other == "settings":
        header["settings"]["optimizer"] = "adam"
    elif other == "code":
        header["settings"]["code"] = "0"
    else:
        header = {"no": "record"}
    path.write_text("\n".join(map(json.dumps, [header, *rows])))
    capsys.readouterr()
    _, rows = run(tmp_path, "0.5")
    assert cells(rows) == [0.5]
    said = {"machine": "cpu: Another", "settings": "optimizer: adam", "code": "code: 0"}
    assert said.get(other, "no record") in capsys.readouterr().out


def test_code_is_known_by_its_content(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(resume.neq_kernels, "__file__", str(tmp_path / "__init__.py"))
    empty = resume.code()
    assert resume.code() == empty
    (tmp_path / "costs.json").write_text("{}")
    assert resume.code() != empty
