"""benchmarks.steps.cpu end to end, on a network small enough; no figure is judged."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

import neq_kernels as neq
from benchmarks.common.records import load
from benchmarks.common.workloads import WORKLOADS, output_layer, random_masks, set_masks
from benchmarks.steps import certainty, comparison, cpu
from benchmarks.steps.correctness import differences
from neq_kernels.measure import bandwidth
from tests.support.step_workloads import TINY


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch):
    monkeypatch.setattr(cpu, "WORKLOADS", TINY)
    half = {
        name: replace(w, autocast=torch.bfloat16, layouts=("nhwc",)) for name, w in TINY.items()
    }
    monkeypatch.setattr(cpu, "BF16_WORKLOADS", half)
    monkeypatch.setattr(cpu, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(cpu, "QUICK", (("tiny", "nhwc"),))
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**20)


def run(tmp_path, *arguments):
    code = cpu.main(["--out", str(tmp_path), "--seconds", "0.01", "--rounds", "6", *arguments])
    return code, *load(tmp_path / "step.jsonl")


def test_one_row_per_cell_and_provider(tmp_path, capsys):
    code, header, rows = run(tmp_path, "--peer", "--r", "1", "0.5", "0")
    assert code == 0
    keys = [(row["layout"], row["r"], row["provider"]) for row in rows]
    assert keys == [
        (layout, r, provider)
        for layout in ("nchw", "nhwc")
        for r in (1.0, 0.5, 0.0)
        for provider in ("dense", "peer1", "neq", comparison.NO_WGRAD)
    ]
    assert header["settings"]["cells"] == [
        ["tiny", layout, "float32", r] for layout in ("nchw", "nhwc") for r in (1.0, 0.5, 0.0)
    ]
    for row in rows:
        assert row["rounds"] in (6, 12, 18)
        for phase in ("forward", "backward", "optimizer", "total"):
            quantiles = [row[f"{phase}_seconds_{level}"] for level in ("p20", "median", "p80")]
            assert quantiles == sorted(quantiles)
        assert ("speedup_median" in row) == (row["provider"] != "dense")
        if "speedup_median" in row:
            assert row["speedup_low"] <= row["speedup_median"] <= row["speedup_high"]
        if row["r"] == 1 and row["provider"] == "neq":
            assert row["bound"] == row["bound_floor"] == 1
        assert ("wide" in row) == (row["provider"] == "neq")
        if row["provider"] == "neq":
            assert row["bound_floor"] <= row["bound"]
            # Records keep four digits.
            ratio = row["speedup_median"] / row["bound_floor"]
            assert row["ratio_floor"] == pytest.approx(ratio, rel=1e-3)
            assert row["wide"] == (row["speedup_width"] > certainty.WIDEST)
            assert row["rounds"] == 18 if row["wide"] else row["tries"] <= 2
    table = (tmp_path / "step.csv").read_text().splitlines()
    assert table[0].startswith("# command:")
    assert len(list(csv.DictReader(table[1:]))) == len(rows)
    printed = capsys.readouterr().out
    table, _, summary = printed.partition("float32: ")
    assert table.count("neq") == 6
    assert table.count("ok") + table.count("short ") == 6
    assert "of the bound with floor, no cell < 0.9" in summary


def test_quick_has_the_quick_cases(tmp_path):
    _, header, rows = run(tmp_path, "--quick")
    assert {tuple(cell[:3]) for cell in header["settings"]["cells"]} == {
        ("tiny", "nhwc", "float32")
    }
    assert {row["r"] for row in rows} == set(cpu.QUICK_SHARES)
    assert {row["provider"] for row in rows} == {"dense", "neq", comparison.NO_WGRAD}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_other_optimizers(tmp_path, optimizer):
    code, _, rows = run(tmp_path, "--layouts", "nchw", "--r", "0.5", "--optimizer", optimizer)
    assert code == 0
    assert len(rows) == 3


def test_bfloat16_has_rows_of_its_own(tmp_path, capsys):
    code, _, rows = run(tmp_path, "--dtypes", "float32", "bfloat16", "--r", "0.5")
    assert code == 0
    found = [(row["dtype"], row["layout"]) for row in rows if row["provider"] == "neq"]
    assert found == [("float32", "nchw"), ("float32", "nhwc"), ("bfloat16", "nhwc")]
    printed = capsys.readouterr().out
    assert "bfloat16: of the bound with floor, geomean" in printed


def test_bfloat16_is_measured_where_the_cpu_computes_in_it(monkeypatch):
    monkeypatch.setattr(cpu, "computes_bfloat16", lambda: True)
    assert {cell.workload.dtype for cell in cpu.chosen_cells()} == {"float32", "bfloat16"}
    assert {cell.workload.dtype for cell in cpu.chosen_cells(quick=True)} == {"float32"}


def wrong_mask(model, masks, r):
    """One neuron of the first layer that is taken for another."""
    neq_masks = dict(masks)
    first = next(iter(neq_masks))
    neq_masks[first] = (neq_masks[first] + 1) % 8
    set_masks(model, neq_masks)


def scaled_gradient(model, masks, r):
    set_masks(model, masks)
    model[0].weight.register_hook(lambda grad: grad * 1.01)


@pytest.mark.parametrize("fault", [wrong_mask, scaled_gradient])
def test_a_wrong_result_has_no_figure_and_fails(tmp_path, capsys, monkeypatch, fault):
    wrong = comparison.Provider("neq", comparison.OURS.build, fault)
    monkeypatch.setattr(cpu, "OURS", wrong)
    code, _, rows = run(tmp_path, "--peer", "--layouts", "nchw", "--r", "0.5")
    assert code == 1
    (row,) = rows
    assert row["provider"] == "neq"
    assert row["error"].startswith("0.weight")
    assert not any("seconds" in key or "speedup" in key for key in row)
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "peer1" not in printed


def test_the_gate_sees_a_wrong_loss_and_a_missing_gradient():
    workload = TINY["tiny"]
    batch = workload.batches("nchw")[0]
    masks = random_masks(neq.convert(workload.model("nchw")), 0.5)
    shifted, silent = workload.model("nchw"), workload.model("nchw")
    with torch.no_grad():
        shifted[8].bias[0] += 1
    silent[8].requires_grad_(False)
    models = {"dense": workload.model("nchw"), "shifted": shifted, "silent": silent}
    found = differences(models, masks, batch, workload.loss)
    assert found["shifted"].startswith("loss")
    assert found["silent"] == "0.weight: a frozen row has a gradient"
    found = differences(models, {}, batch, workload.loss)
    assert found.keys() == {"shifted"}
    everything = random_masks(neq.convert(workload.model("nchw")), 1.0)
    assert (
        differences(models, everything, batch, workload.loss)["silent"] == "8.weight: no gradient"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "no"],
        ["--r", "1.5"],
        ["--seconds", "0"],
        ["--threads", "0"],
        ["--layouts", "x"],
        ["--dtypes", "float16"],
        ["--rounds", "0"],
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cpu.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_masks_have_the_share_asked_for():
    model = neq.convert(TINY["tiny"].model("nchw"))
    assert output_layer(model) == "8"
    sizes = {name: len(active) for name, active in random_masks(model, 0.1).items()}
    assert sizes == {"0": 1, "1": 1, "3": 1, "4": 1, "8": 1}
    sizes = {name: len(active) for name, active in random_masks(model, 0.0).items()}
    assert sizes == {"0": 0, "1": 0, "3": 0, "4": 0, "8": 10}


@pytest.mark.parametrize("name", ["resnet32", "mlp"])
def test_the_real_cases_are_the_same_at_every_call(name):
    workload = WORKLOADS[name]
    layout = workload.layouts[-1]
    first, second = workload.model(layout), workload.model(layout)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    x, y = workload.batches(layout, 1)[0]
    assert x.shape == (workload.images, *workload.shape)
    assert int(y.max()) < workload.classes
    assert (layout == "nhwc") == (x.dim() == 4 and not x.is_contiguous())


def test_backprop_passes_layers_without_a_weight_gradient():
    layers = [torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2)]
    model = comparison.without_wgrads(torch.nn.Sequential(*layers), ["0"])
    arrived = []

    def watch(module, args, output):
        output.register_hook(arrived.append)

    model[0].register_forward_hook(watch)
    model(torch.randn(3, 4)).sum().backward()
    assert len(arrived) == 1
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_backprop_comes_down_to_attention_that_learns_nothing():
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    model = comparison.without_wgrads(torch.nn.ModuleList([attention]), ["0"])
    x = torch.randn(2, 3, 8)
    output, weights = model[0](x, x, x)
    assert output.requires_grad
    assert not weights.requires_grad
    output.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
