"""The kernel benchmark: its rows, its gate, its targets and the page made from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.common.records import load
from benchmarks.kernels import comparison, cpu, goals, layer_shapes, peers, wgrad_times
from benchmarks.kernels.layer_shapes import Shape
from benchmarks.suite import __main__ as suite
from benchmarks.suite import figures, page, summary
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.dispatch import backward, contests, trial
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.dispatch.selection import selector
from neq_kernels.machine import cpu_class

CONV = Problem(
    (2, 8, 6, 6),
    (12, 8, 3, 3),
    ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    True,
    torch.float32,
)
DEPTHWISE = Problem(
    (2, 8, 6, 6),
    (8, 1, 3, 3),
    ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 8),
    False,
    torch.float32,
)
LINEAR = Problem((10, 8), (12, 8), None, False, torch.float32)
TINY = [Shape("net", "a", CONV), Shape("net", "b", DEPTHWISE), Shape("net", "c", LINEAR)]
FAST = ["--runs", "1", "--seconds", "0.001"]


@pytest.fixture
def tiny_shapes(monkeypatch):
    def shapes(names, dtype):
        return [replace(s, problem=s.problem._replace(dtype=dtype)) for s in TINY]

    monkeypatch.setattr(cpu, "shape_set", shapes)
    problems = {(s.network, s.layer, s.layout): s.problem for s in TINY}
    monkeypatch.setattr(figures, "problems_by_cell", lambda: problems)


def test_the_shape_set_has_every_layer_once_in_both_layouts():
    found = layer_shapes.shape_set(("resnet32", "vit_b_16"))
    problems = [shape.problem for shape in found]
    assert len(set(problems)) == len(problems)
    convolutions = [p for p in problems if p.geometry is not None]
    assert {p._replace(channels_last=not p.channels_last) for p in convolutions} == set(
        convolutions
    )
    assert ("resnet32", "layer3.0.conv2", "nhwc") in {(s.network, s.layer, s.layout) for s in found}
    with pytest.raises(ValueError, match="expected some of resnet32"):
        layer_shapes.shape_set(("resnet33",))


@pytest.mark.usefixtures("tiny_shapes")
@pytest.mark.parametrize("dtype", layer_shapes.DTYPES)
def test_operands_and_the_unit_of_errors_are_of_the_dtype(dtype, tmp_path, monkeypatch):
    """A gradient that was rounded to bfloat16 is right in bfloat16, and wrong in float32."""
    original = trial.wgrad

    def rounded(*arguments):
        call = original(*arguments)
        return lambda: (lambda gradient: gradient.bfloat16().to(gradient.dtype))(call())

    monkeypatch.setattr(trial, "wgrad", rounded)
    arguments = ["--dtype", dtype, "--strategies", "--out", str(tmp_path), *FAST]
    code = cpu.main([*arguments, "--shares", "0.5"])
    rows = load(tmp_path / "kernels.jsonl")[1]
    assert {row["dtype"] for row in rows} == {dtype}
    wrong = {row["provider"] for row in rows if "wrong" in row}
    assert bool(wrong) == (dtype == "float32") == (code != 0)
    assert all(provider.startswith("neq ") for provider in wrong)


@pytest.mark.usefixtures("tiny_shapes")
def test_every_cell_has_every_provider(tmp_path, capsys):
    arguments = ["--strategies", "--tuned", "--peers", "mask", "permuted"]
    assert cpu.main([*FAST, *arguments, "--out", str(tmp_path)]) == 0
    header, rows = load(tmp_path / "kernels.jsonl")
    assert header["settings"]["read_bandwidth"] > 0
    cells = {(row["layer"], row["active"]) for row in rows}
    assert cells == {
        *(("a", n) for n in (12, 9, 6, 3, 1)),
        *(("b", n) for n in (8, 6, 4, 2, 1)),
        *(("c", n) for n in (12, 9, 6, 3, 1)),
    }
    for layer, n in cells:
        providers = {r["provider"] for r in rows if (r["layer"], r["active"]) == (layer, n)}
        assert {"dense", "index_select", "neq", "neq tuned", "mask", "neq dense"} <= providers
        assert ("permuted" in providers) == (n == 1)
    ours = [row for row in rows if row["provider"] == "neq"]
    assert all(row["strategy"] in {"dense", "pack", "custom"} for row in ours)
    assert "fewer active, against dense" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_shapes")
def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    right = backward.linear_call

    def off_by_a_percent(*args):
        call = right(*args)
        return lambda *operands: tuple(None if g is None else 1.01 * g for g in call(*operands))

    monkeypatch.setattr(backward, "linear_call", off_by_a_percent)
    assert cpu.main([*FAST, "--out", str(tmp_path)]) == 1
    rows = load(tmp_path / "kernels.jsonl")[1]
    wrong = [row for row in rows if "wrong" in row]
    assert {(row["provider"], row["layer"]) for row in wrong} == {("neq", "c")}
    assert not any("seconds_median" in row for row in wrong)
    assert "wrong: neq on net c" in capsys.readouterr().out


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("problem", [CONV, LINEAR], ids=["conv", "linear"])
def test_what_is_timed_is_what_a_layer_calls_once_it_has_chosen(problem, monkeypatch):
    monkeypatch.setattr(contests, "ALLOWED_SECONDS", 1e9)
    monkeypatch.setattr(CostModel, "strategy", lambda *_: Strategy.CUSTOM)
    monkeypatch.setattr(CostModel, "in_doubt", lambda *_: [Strategy.CUSTOM, Strategy.PACK])
    monkeypatch.setattr(contests.Contest, "_winner", lambda self: KernelChoice(Strategy.PACK))
    decisions = []
    decide = selector.decide

    def noted(*arguments):
        decisions.append(decide(*arguments))
        return decisions[-1]

    monkeypatch.setattr(selector, "decide", noted)
    channels = trial.spread(6, problem.neurons)
    call = cpu._ours(problem, channels, *trial.operands(problem))
    assert not selector.contests
    decisions.clear()
    for _ in range(3):
        call()
    assert decisions == [(KernelChoice(Strategy.PACK), None)]


def test_a_peer_with_a_missing_row_is_caught():
    grad_output, input, weight = trial.operands(LINEAR)
    channels = trial.spread(6, 12)
    exact = peers.dense(
        None, *(t.double() for t in (grad_output, input, weight)), torch.arange(12), False
    )[0]
    gradient = exact.float()
    gradient[channels.frozen] = 0
    calls = {"dense": lambda: exact.float(), "good": lambda: gradient}
    short = gradient.clone()
    short[channels.active[0]] = 0
    errors = comparison.errors_over_dense({**calls, "short": lambda: short}, exact, channels)
    assert errors["good"] <= 1
    assert errors["short"] > 1000


def row(over, provider="neq", run=0, **about):
    base = {"network": "n", "layer": "l", "layout": "nchw", "kind": "conv", "share": "0.5"}
    base |= {"active": 8, "channels": 16, "provider": provider, "run": run}
    return {**base, "over_dense_median": over, "over_index_select_median": 2 * over, **about}


def test_targets_count_a_cell_with_its_better_run():
    rows = [row(0.9, run=0), row(0.98, run=1), row(4.0, layer="m"), row(0.5, provider="other")]
    judged = {each.target.name: each for each in goals.judge(rows)}
    slower = judged["fewer active, against dense"]
    assert (slower.value, slower.cells, slower.below, slower.passes) == (0.98, 2, 0, True)
    mean = judged["NCHW, against index_select"]
    assert mean.value == pytest.approx((2 * 0.98 * 2 * 4.0) ** 0.5)
    assert "all active, against dense" not in judged
    short = goals.judge([row(0.9), row(2.0, layer="m")])
    assert [each.passes for each in short if each.target.worst] == [False]
    assert "short" in goals.text(short, lambda passes: "ok" if passes else "short")


@pytest.mark.usefixtures("tiny_shapes")
def test_pictures_and_page_come_from_the_records(tmp_path, monkeypatch):
    assert cpu.main([*FAST, "--tuned", "--out", str(tmp_path)]) == 0
    block = replace(page.BLOCK, page=tmp_path / "page.md")
    block.page.write_text(f"before\n{block.begin}old\n{block.end}after\n")
    monkeypatch.setattr(page, "BLOCK", block)
    for module in (page, summary):
        monkeypatch.setattr(module, "SUITE", tmp_path / "results")
    monkeypatch.setattr(wgrad_times, "DATA", tmp_path / "costs")
    assert suite.main(["--publish", "--out", str(tmp_path)]) == 0
    assert "| fewer active, against dense | worst cell |" in block.page.read_text()
    published = {path.name for path in (tmp_path / "results" / cpu_class()).iterdir()}
    assert published == {"kernels.csv", "kernel_speedups.png", "roofline.png", "strategies.png"}
