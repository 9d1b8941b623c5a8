"""The fit of the tables of costs, and how it is judged."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.common.records import Record
from benchmarks.kernels import fit_cost_model, regret, wgrad_times
from benchmarks.kernels.wgrad_times import Cell
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.dispatch import calibration, cost_model
from neq_kernels.dispatch.cost_model import CostModel

GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
CHANNELS = (
    *((8, 16), (16, 8), (16, 64), (32, 32), (64, 16), (24, 48)),
    *((48, 96), (96, 24), (8, 8), (40, 40), (10, 80), (80, 12)),
)
CONVS = {
    ("net", f"conv {i}", layout): Problem(
        (4, c, 12, 12), (k, c, 3, 3), GEOMETRY, layout == "nhwc", torch.float32
    )
    for i, (c, k) in enumerate(CHANNELS)
    for layout in ("nchw", "nhwc")
}
ROWS = {
    ("net", f"linear {i}", "rows"): Problem((t, c), (k, c), None, False, torch.float32)
    for i, (t, c, k) in enumerate([(128, 8, 32), (256, 32, 16), (64, 64, 64), (512, 16, 24)])
}
PROBLEMS = CONVS | ROWS
DENSE, PACK, CUSTOM = Strategy


@pytest.fixture(autouse=True)
def _small_set(monkeypatch):
    monkeypatch.setattr(wgrad_times, "problems_by_cell", lambda: PROBLEMS)


def made(dtype="float32", custom=300.0, speed=1.0):
    """Times that a linear model makes."""
    cells = {}
    for (network, layer, layout), problem in PROBLEMS.items():
        k = problem.neurons
        for n in sorted({k, k // 2, k // 4, 1}):
            f = cost_model.features(problem, n)
            cells[Cell(dtype, network, layer, layout, n)] = {
                DENSE: speed * (100e-6 + f["all products"] * 90.0),
                PACK: speed * (500e-6 + f["blocked products"] * 90.0),
                CUSTOM: speed * (5e-6 + f["products"] * custom),
            }
    return cells


def test_the_fit_finds_the_coefficients_that_made_the_times():
    cells = made()
    problems = wgrad_times.problems_of(cells)
    exact = CostModel("", {"float32": fit_cost_model._for_times(cells)})
    table = fit_cost_model.fit(cells)
    model = CostModel("", table)
    for cell, seconds in cells.items():
        for strategy, time in seconds.items():
            at = problems[cell], cell.active, strategy
            assert exact.seconds(*at) == pytest.approx(time, rel=0.02)
            # Moved away from choices that are close.
            assert model.seconds(*at) == pytest.approx(time, rel=0.25)
    judged = regret.judge(cells, regret.by_model(model))
    assert judged.slower == 0
    assert judged.regret < 1.01
    assert judged.meets(regret.IN_SAMPLE)
    for strategy in Strategy:
        mine = [c for g, c in table["float32"].items() if g.startswith(strategy.name.lower())]
        assert 0 < sum(map(len, mine)) <= fit_cost_model.MOST


def test_coefficients_give_way_where_choices_would_be_wrong(monkeypatch):
    """Half the shapes, unlike the others, are slower by a strategy than the rest says."""
    cells = made(custom=80.0)
    odd = {cell for cell in cells if int(cell.layer.split()[1]) % 2}
    cells = {
        cell: {**t, CUSTOM: t[DENSE] * 1.2} if cell in odd and cell.layout == "nchw" else t
        for cell, t in cells.items()
    }
    moved = CostModel("", fit_cost_model.fit(cells))
    monkeypatch.setattr(fit_cost_model, "_for_choices", lambda cells, table: table)
    unmoved = CostModel("", fit_cost_model.fit(cells))
    judged, before = (regret.judge(cells, regret.by_model(model)) for model in (moved, unmoved))
    assert judged.slower < before.slower
    # The other layout has no reason to move.
    problems = wgrad_times.problems_of(cells)
    for cell in cells:
        if cell.layout == "nhwc":
            times = (m.seconds(problems[cell], cell.active, CUSTOM) for m in (moved, unmoved))
            assert next(times) == pytest.approx(next(times), rel=0.2)


def test_folds_part_shapes_and_keep_their_cells_together():
    cells = made()
    judged = []
    for learned, left in fit_cost_model.folds(cells):
        assert not learned.keys() & left.keys()
        assert learned.keys() | left.keys() == cells.keys()
        layers = [{cell.layer for cell in some} for some in (learned, left)]
        assert not layers[0] & layers[1]
        judged += left
    assert sorted(judged) == sorted(cells)


def test_data_survives_on_disk(tmp_path):
    runs = [made(), made(speed=0.5)]
    wgrad_times.write(tmp_path / "a.csv", runs)
    again = wgrad_times.read(tmp_path / "a.csv")
    for cells, read in zip(runs, again, strict=True):
        assert cells.keys() == read.keys()
        for cell, seconds in cells.items():
            assert read[cell] == pytest.approx(seconds, rel=1e-3)
    middle = wgrad_times.typical(again)
    for cell, seconds in again[0].items():
        assert middle[cell] == pytest.approx(
            {s: t * 0.5**0.5 for s, t in seconds.items()}, rel=1e-3
        )


def row(strategy, seconds, run=0, **more):
    about = {"network": "net", "layer": "linear 0", "layout": "rows", "active": 8}
    about |= {"provider": f"neq {strategy.name.lower()}", "run": run}
    return {**about, "seconds_median": seconds, **more}


def test_a_record_becomes_data(tmp_path):
    with Record(tmp_path, "kernels", {}) as record:
        for run in (0, 1):
            for strategy in Strategy:
                record.add(row(strategy, 1e-3 * (strategy + 1 + run), run))
                record.add(row(strategy, 2e-3, run, dtype="bfloat16"))
        record.add(row(CUSTOM, 1e-9, wrong="by a mile"))
        record.add({**row(CUSTOM, 1e-9), "provider": "neq"})
    runs = wgrad_times.read_record(tmp_path / "kernels.jsonl")
    cell = Cell("float32", "net", "linear 0", "rows", 8)
    assert runs[1][cell] == {DENSE: 2e-3, PACK: 3e-3, CUSTOM: 4e-3}
    assert runs[0][cell] == {DENSE: 1e-3, PACK: 2e-3, CUSTOM: 3e-3}
    assert runs[0][cell._replace(dtype="bfloat16")] == dict.fromkeys(Strategy, 2e-3)


def test_contests_are_judged_by_another_run_than_they_are_held_in():
    cells = made()
    problems = wgrad_times.problems_of(cells)
    model = CostModel("", fit_cost_model.fit(cells))
    rivals = {c: model.in_doubt(problems[c], c.active, tuple(Strategy)) for c in cells}
    doubtful = {c for c in cells if rivals[c]}
    assert 0 < len(doubtful) < len(cells)
    second = {
        cell: {s: (0.1 if s == rivals[cell][-1] else 1.0) for s in Strategy} if rivals[cell] else t
        for cell, t in cells.items()
    }
    judged = regret.with_contests([cells, second], model)
    assert judged.worst <= 1.0
    told = regret.with_contests([second, second], model)
    assert told.regret < judged.regret


def test_another_machine_is_judged_without_the_cells_it_was_calibrated_by(monkeypatch):
    """A machine of half the speed, whose custom kernels are as fast as here."""
    here, there = made(), made(speed=2.0)
    there = {cell: {**t, CUSTOM: here[cell][CUSTOM]} for cell, t in there.items()}
    chosen = [(p, (max(1, p.neurons // 2),)) for p in list(PROBLEMS.values())[::4]]
    monkeypatch.setattr(calibration, "canonical", lambda: chosen)
    table = CostModel("here", fit_cost_model.fit(here))
    raw = regret.judge(there, regret.by_model(table))
    judged, name = regret.calibrated(there, [table])
    assert name == "here"
    assert judged.cells == len(there) - len(chosen)
    assert judged.regret < raw.regret
    nothing, name = regret.calibrated(there, [])
    assert name is None
    assert nothing.cells == judged.cells


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(wgrad_times, "DATA", tmp_path / "data")
    monkeypatch.setattr(cost_model, "COSTS", tmp_path / "costs")
    (tmp_path / "costs").mkdir()
    wgrad_times.write(tmp_path / "data" / "a.csv", [made()])
    (tmp_path / "costs" / "a.json").write_text('{"measured_on": {"cpu": "a"}, "costs": {}}')
    return tmp_path


def test_the_shipped_tables_are_those_of_the_data(own_files, capsys):
    assert fit_cost_model.main(["--check"]) != 0
    assert "a.json is not what a.csv gives" in capsys.readouterr().out
    assert fit_cost_model.main([]) == 0
    assert fit_cost_model.main(["--check"]) == 0
    path = own_files / "costs" / "a.json"
    content = json.loads(path.read_text())
    assert content["measured_on"] == {"cpu": "a"}
    content["costs"]["float32"]["custom linear rows"]["products"] *= 1.01
    path.write_text(json.dumps(content))
    assert fit_cost_model.main(["--check"]) != 0


def test_the_check_fails_where_a_figure_falls_short(own_files, monkeypatch, capsys):
    assert fit_cost_model.main([]) == 0
    monkeypatch.setattr(regret, "LEFT_OUT", regret.Goal(0.9, 0.0))
    assert fit_cost_model.main(["--check"]) != 0
    assert "short" in capsys.readouterr().out


def test_no_record_or_none_of_strategies(tmp_path, own_files, capsys):
    assert fit_cost_model.main([str(tmp_path / "none.jsonl")]) == 2
    with Record(tmp_path, "kernels", {}) as record:
        record.add({"provider": "dense", "run": 0})
    assert fit_cost_model.main([str(tmp_path / "kernels.jsonl")]) == 2
    assert "expected a record of benchmarks.kernels.cpu --strategies" in capsys.readouterr().err
