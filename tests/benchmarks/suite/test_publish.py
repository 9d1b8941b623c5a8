"""Results by class of CPU: each machine writes its own, the page shows all of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.common import by_class
from benchmarks.common.records import Record, write_csv
from benchmarks.kernels import wgrad_times
from benchmarks.suite import __main__ as suite
from benchmarks.suite import figures, page, summary
from benchmarks.training.report import publish
from neq_kernels.machine import cpu_class

OTHER = next(name for name in by_class.CPU_CLASSES if name != cpu_class())
LEVELS = ("p20", "median", "p80")
KERNEL = {"run": 0, "network": "n", "layer": "l", "kind": "conv", "layout": "nchw", "share": "0.5"}
KERNEL |= {"input": "1x2", "weight": "16x2", "active": 8, "channels": 16, "strategy": "pack"}


def kernel_row(over, **about):
    figures = {"over_dense_median": over, "over_index_select_median": over}
    return {**KERNEL, "provider": "neq", "seconds_median": 1e-3, **figures, **about}


def step_row(model="resnet18", r=0.5, speedup=1.2, bound=1.2, **about):
    row = {"model": model, "layout": "nchw", "dtype": "float32", "r": r, "provider": "neq"}
    row |= {f"speedup_{level}": speedup for level in LEVELS}
    row |= {"speedup_low": speedup - 0.01, "speedup_high": speedup + 0.01, "wide": False}
    row |= {"total_seconds_median": 0.1, "backward_speedup_median": speedup}
    row |= {"bound": bound, "bound_floor": bound}
    row |= {"ratio": speedup / bound, "ratio_floor": speedup / bound}
    return row | about


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Committed results of another class, and a page for all."""
    folder = tmp_path / "results"
    monkeypatch.setattr(page, "SUITE", folder / "suite")
    monkeypatch.setattr(summary, "SUITE", folder / "suite")
    monkeypatch.setattr(summary, "DEMO", folder / "demo")
    monkeypatch.setattr(wgrad_times, "DATA", folder / "costs")
    block = replace(page.BLOCK, page=tmp_path / "page.md")
    block.page.write_text(f"before\n{block.begin}old\n{block.end}after\n")
    monkeypatch.setattr(page, "BLOCK", block)
    commit(folder / "suite" / OTHER, "kernels", [kernel_row(0.5), kernel_row(2.0, layer="m")])
    return folder


def commit(folder, part, rows, name=OTHER):
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": "A CPU", "instructions": "SOME", "threads": 2, "torch": "2.10", "date": "d"}
    write_csv(
        folder / f"{part}.csv", {"command": "c", "machine": machine | {"cpu_class": name}}, rows
    )


def measured(run, part, rows, name=None):
    with Record(run, part, {"peak_flops": 1e9, "read_bandwidth": 1e9}) as record:
        for row in rows:
            record.add(row)
    if name is not None:
        path = run / f"{part}.jsonl"
        header, *rest = path.read_text().splitlines()
        header = json.loads(header)
        header["machine"]["cpu_class"] = name
        path.write_text("\n".join([json.dumps(header), *rest]) + "\n")


def test_a_run_is_published_for_its_class_alone(results, tmp_path):
    before = (results / "suite" / OTHER / "kernels.csv").read_bytes()
    measured(tmp_path / "run", "step", [step_row(), step_row("mlp", 0.1, 1.0, 1.25)])
    measured(tmp_path / "run", "account_mlp_nchw_float32_0.1", [{"layer": "a", "miss_us": 1.0}])
    assert suite.main(["--publish", "--out", str(tmp_path / "run")]) == 0
    own = results / "suite" / cpu_class()
    assert {path.name for path in own.iterdir()} == {
        *("step.csv", "step_speedups.png", "account_mlp_nchw_float32_0.1.csv")
    }
    assert (results / "suite" / OTHER / "kernels.csv").read_bytes() == before
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    sections = [line for line in text.splitlines() if line.startswith("#")]
    expected = {
        OTHER: [f"### {OTHER}", f"#### kernels, {OTHER}"],
        cpu_class(): [f"### {cpu_class()}", f"#### step, {cpu_class()}"],
    }
    in_order = [line for name in by_class.CPU_CLASSES for line in expected.get(name, [])]
    assert sections == ["### Side by side", *in_order]
    assert f"results/suite/{cpu_class()}/step_speedups.png" in text
    assert "- mlp nchw float32 r=0.1: 0.800 of the bound with floor; [account](" in text
    assert "| mlp | nchw | float32 | 0.1 | 100.0 | 1.000 | 0.990–1.010 |" in text
    assert "0.800 **short** |" in text


def test_a_red_cell_without_its_account_says_so(results, tmp_path):
    measured(tmp_path / "run", "step", [step_row(r=1, speedup=0.95, bound=1.0)])
    page.publish(tmp_path / "run")
    said = "- resnet18 nchw float32 r=1: 0.950 of dense; no account"
    assert said in (tmp_path / "page.md").read_text()


def test_records_of_another_class_are_refused(results, tmp_path, capsys):
    measured(tmp_path / "run", "step", [step_row()])
    measured(tmp_path / "run", "overhead", [], name=OTHER)
    assert suite.main(["--publish", "--out", str(tmp_path / "run")]) == 2
    said = f"overhead.jsonl: expected figures of {cpu_class()}, got {OTHER}"
    assert said in capsys.readouterr().err
    assert "old" in (tmp_path / "page.md").read_text()


def test_committed_files_in_the_folder_of_another_class_are_refused(results):
    commit(results / "suite" / OTHER, "kernels", [kernel_row(2.0)], name=cpu_class())
    with pytest.raises(ValueError, match=f"expected figures of {OTHER}, got {cpu_class()}"):
        page.published()


def test_the_class_of_old_records():
    assert by_class.class_of({"instructions": "AVX2"}) == "x86-avx2"
    assert by_class.class_of({"instructions": "AVX512"}) == ""
    assert by_class.class_of({"instructions": "AVX2", "cpu_class": "other"}) == "other"


def test_a_page_needs_records_and_a_place(tmp_path, monkeypatch, capsys):
    assert suite.main(["--publish", "--out", str(tmp_path)]) == 2
    assert "expected records" in capsys.readouterr().err
    measured(tmp_path, "overhead", [{"case": "c", "what": "w"}])
    block = replace(page.BLOCK, page=tmp_path / "page.md")
    block.page.write_text("no markers")
    monkeypatch.setattr(page, "BLOCK", block)
    monkeypatch.setattr(page, "SUITE", tmp_path / "suite")
    assert suite.main(["--publish", "--out", str(tmp_path)]) == 2
    assert block.page.read_text() == "no markers"
    assert not (tmp_path / "suite").exists()
    assert figures.main([str(tmp_path)]) == 2


def demo(folder, name, speedup=0.98):
    folder.mkdir(parents=True, exist_ok=True)
    for each in publish.FILES:
        (folder / each).write_text("")
    machine = {"cpu": "A CPU", "threads": 2, "torch": "2.10", "date": "d", "cpu_class": name}
    run = {"scene": "From scratch", "run": "neq", "policy": "neq", "test_accuracy": 0.8}
    run |= {"step_ms": 1.0, "frozen_mean": 0.1, "frozen_last_epoch": 0.1, "saved_seconds": 1.0}
    run |= {
        "speedup_mean": speedup,
        "bound_mean": 1.01,
        "speedup_last_epoch": 1,
        "bound_last_epoch": 1,
    }
    summary = {"machine": machine, "runs": [run | {"dense_step_seconds": 1.0}]}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_demo_is_published_for_its_class_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "DEMO", tmp_path / "demo")
    block = replace(publish.BLOCK, page=tmp_path / "page.md")
    block.page.write_text(f"{block.begin}{block.end}")
    monkeypatch.setattr(publish, "BLOCK", block)
    demo(tmp_path / "demo" / OTHER, OTHER)
    demo(tmp_path / "run", cpu_class(), 1.5)
    assert publish.main([str(tmp_path / "run")]) == 0
    text = block.page.read_text()
    assert text.index("0.980 (1.010)") >= 0
    assert text.index("1.500 (1.010)") >= 0
    assert (tmp_path / "demo" / cpu_class() / "summary.csv").exists()
    demo(tmp_path / "run", OTHER)
    assert publish.main([str(tmp_path / "run")]) == 2
    assert f"expected figures of {cpu_class()}, got {OTHER}" in capsys.readouterr().err


def rows_of_summary():
    return {line.split(" | ")[0].strip("| "): line for line in summary.lines()[2:]}


def test_the_summary_has_every_class_side_by_side(results, capsys):
    suite_folder = results / "suite" / cpu_class()
    commit(
        suite_folder,
        "kernels",
        [
            *(
                kernel_row(over, layer=layer)
                for over, layer in ((0.96, "a"), (0.98, "b"), (1.4, "c"))
            ),
            kernel_row(0.9, layer="twice", run=0),
            kernel_row(1.1, layer="twice", run=1),
            kernel_row(0.8, layer="whole", active=16),
            kernel_row(0.1, layer="peer", provider="index_select"),
        ],
        cpu_class(),
    )
    steps = [
        step_row(r=1, speedup=0.96, bound=1.0),
        step_row(r=0.5, speedup=1.1, bound=1.2, bound_floor=1.12, ratio_floor=1.1 / 1.12),
        step_row("mlp", r=0.5, speedup=0.9, bound=1.2),
        step_row("mlp", r=0.5, dtype="bfloat16"),
    ]
    commit(suite_folder, "step", steps, cpu_class())
    demo(results / "demo" / OTHER, OTHER)
    found = rows_of_summary()
    at = summary.classes().index(cpu_class()) + 1

    def cell(what, column=at):
        return found[what].strip("| ").split(" | ")[column]

    assert set(summary.classes()) == {OTHER, cpu_class()}
    assert set(found) == set(summary.ROWS)
    wgrads = "wgrad slower than dense by > 3 %, everything active / fewer"
    assert cell(wgrads) == "1 of 1 / 1 of 4, worst 0.80"
    assert cell(wgrads, 3 - at) == "0 of 2, worst 0.50".replace("0 of 2", "1 of 2")
    assert cell("whole steps below 0.96 of the bound") == "float32: 2 of 3; bfloat16: 0 of 1"
    floored = "whole steps below 0.96 of the bound with floor"
    assert cell(floored) == "float32: 1 of 3; bfloat16: 0 of 1"
    assert cell("slowest step over dense, everything active") == (
        "float32: 0.960 (resnet18 nchw); bfloat16: –"
    )
    half = "slowest step over dense, half of the channels active"
    assert cell(half) == "float32: 0.900 (mlp nchw); bfloat16: 1.200 (mlp nchw)"
    scratch = "`make demo`, from scratch: NEq's step against dense (bound)"
    assert cell(scratch, 3 - at) == "0.980 (1.010)"
    assert cell(scratch) == summary.MISSING
    assert summary.main([]) == 0
    assert wgrads in capsys.readouterr().out
