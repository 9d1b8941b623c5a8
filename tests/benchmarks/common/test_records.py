from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from benchmarks.common.records import Record, load, load_csv


def test_records_keep_four_digits(tmp_path):
    with Record(tmp_path, "x", {"a": 1}) as record:
        record.add({"value": 1.23456789e-5, "name": "n"})
    header, rows = load(tmp_path / "x.jsonl")
    assert rows == [{"value": 1.235e-5, "name": "n"}]
    assert header["settings"] == {"a": 1}
    first, second, third = (tmp_path / "x.csv").read_text().splitlines()
    assert first.startswith("# command: ")
    assert (second, third) == ("value,name", "1.235e-05,n")
    about, again = load_csv(tmp_path / "x.csv")
    assert again == rows
    assert about["command"] == header["command"]
    assert about["machine"] == {name: str(value) for name, value in header["machine"].items()}
    (tmp_path / "y.jsonl").write_text(json.dumps({"no": "record"}))
    with pytest.raises(ValueError, match="expected a record"):
        load(tmp_path / "y.jsonl")
    (tmp_path / "y.csv").write_text("value,name\n1,n\n")
    with pytest.raises(
        ValueError, match=r"expected a first line '# command: \.\.\.', got 'value,name"
    ):
        load_csv(tmp_path / "y.csv")


def test_a_table_keeps_the_types_of_its_values(tmp_path):
    rows = [{"n": 3, "x": 3.0, "yes": True, "text": "16x3"}, {"n": 4, "no": False}]
    with Record(tmp_path, "x", {}) as record:
        for each in rows:
            record.add(each)
    again = load_csv(tmp_path / "x.csv")[1]
    assert again == rows
    assert [type(value) for value in again[0].values()] == [int, float, bool, str]


def test_the_command_is_the_one_that_was_typed(tmp_path, monkeypatch):
    main = types.ModuleType("__main__")
    main.__spec__ = ModuleSpec("benchmarks.suite.__main__", None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["suite/__main__.py", "--out", "o"])
    with Record(tmp_path, "x", {}) as record:
        pass
    assert record.header["command"] == "python -m benchmarks.suite --out o"
    main.__spec__ = None
    monkeypatch.setattr(sys, "argv", ["script.py", "--quick"])
    with Record(tmp_path, "x", {}) as record:
        pass
    assert record.header["command"] == "python script.py --quick"
