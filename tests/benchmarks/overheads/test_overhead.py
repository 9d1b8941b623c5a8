"""The overhead benchmark: what it times is what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.records import load
from benchmarks.overheads import overhead
from tests.support.backends import cpu


@pytest.mark.skipif(cpu.unavailable() is not None, reason="it measures the extension")
def test_every_case_has_its_parts(tmp_path):
    before = torch.get_num_threads()
    try:
        assert overhead.main(["--quick", "--seconds", "0.02", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    rows = load(tmp_path / "overhead.jsonl")[1]
    whats = {"empty", "torch", "neq", overhead.LIBRARY_FORWARD, overhead.LIBRARY_DGRAD, "overhead"}
    for case in overhead.cases():
        found = {row["what"]: row for row in rows if row["case"] == case}
        assert whats < set(found)
        assert found["overhead"]["passes"] == (
            found["overhead"]["seconds_median"] <= overhead.TARGET
        )


def test_without_the_extension_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(overhead.selector, "backends_for", lambda device: ("aten",))
    assert overhead.main(["--quick"]) == 2
    assert "not in use here" in capsys.readouterr().out
