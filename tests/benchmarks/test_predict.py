"""Predictions for GPUs, with predictors whose answers can be worked out by hand."""

from __future__ import annotations

import csv

import pytest

import benchmarks.matmul_predictor as matmul
from benchmarks import predict, predict_page
from benchmarks.cases import CASES
from benchmarks.matmul_predictor import Kernel
from benchmarks.predicted_step import (
    ASSUMPTIONS,
    GPUS,
    Assumptions,
    Gpu,
    best_choice,
    own_choice,
)
from benchmarks.record import load
from benchmarks.step_work import BYTES, occupied
from neq_kernels.problem import Strategy
from tests.benchmarks.predict_cases import (
    ATTENDING,
    CONVS,
    LAUNCH,
    STACK,
    by_work,
    free,
    step_of,
    work_of,
)
from tests.benchmarks.step_cases import TINY

ABOUT = {"model", "gpu", "images", "layout", "dtype", "assumptions", "r"}
SHARES = (1.0, 0.5, 0.25, 0.1, 0.02)
UNIT = Gpu("H100_SXM", bandwidth=1.0, tensor_flops=1e30, vector_flops=1e30)
OPTIMISTIC, PESSIMISTIC = ASSUMPTIONS["optimistic"], ASSUMPTIONS["pessimistic"]


def predictions(case, ask=by_work, shares=SHARES, layout=None):
    return list(predict.rows(case, layout or case.layouts[0], list(GPUS), shares, "bf16", ask))


@pytest.fixture
def package(monkeypatch):
    """The command finds a predictor and models whose prediction takes no time."""
    monkeypatch.setattr(matmul, "unavailable", lambda: None)
    monkeypatch.setattr(matmul, "version", lambda: "somebody's predictor 1")
    monkeypatch.setattr(matmul, "ask", by_work)
    monkeypatch.setattr(predict, "CASES", {"tiny": TINY["tiny"], "stack": STACK})
    monkeypatch.setattr(predict, "BATCHES", {"tiny": (4, 8), "stack": (40, None)})


@pytest.mark.parametrize("case", [STACK, CONVS, ATTENDING], ids=lambda case: case.name)
def test_with_everything_active_nothing_is_saved_and_never_more_than_the_bound(case):
    rows = predictions(case)
    assert len(rows) == len(GPUS) * len(ASSUMPTIONS) * len(SHARES)
    for row in rows:
        assert 0 < row["predicted_bound_floor"] <= row["predicted_bound"]
        for name in ("predicted_speedup", "predicted_speedup_best_strategies"):
            if row["r"] == 1:
                assert row[name] == row["predicted_bound"] == 1.0
                assert row["predicted_mask_bytes"] == 0
            else:
                assert row[name] <= row["predicted_bound_floor"]
                assert row["predicted_mask_bytes"] > 0


def test_launches_and_taps_in_memory_cost():
    assert OPTIMISTIC != PESSIMISTIC
    for work in (work_of(CONVS, "nhwc"), work_of(STACK)):
        active = {layer.name: {20} for layer in work.layers}
        dense = step_of(work, active=active)
        launched = step_of(work, active=active, assumptions=Assumptions(free_launches=False))
        assert launched.dense == dense.dense
        for layer in work.layers:
            if layer.problem.neurons > 20:
                launches_of = {Strategy.DENSE: 1, Strategy.FUSED: 1, Strategy.PACK: 2}
                if layer.is_grouped:
                    del launches_of[Strategy.PACK]
                for strategy, launches in launches_of.items():
                    more = launched.wgrad(layer, 20, strategy).seconds
                    more -= dense.wgrad(layer, 20, strategy).seconds
                    assert more == pytest.approx(launches * LAUNCH)

    def loading(gpu, dtype, gemms):
        return {g: (Kernel(0.0, 1.0, 0.0, 0.0),) for g in gemms}

    work = work_of(CONVS, "nhwc")
    cached, read = (
        step_of(work, loading, Assumptions(taps_cached=each)).wgrads for each in (True, False)
    )
    assert read["0"] == 1.0
    t, c, k = 4 * 6 * 6, 16 * 9, 64
    assert cached["0"] == pytest.approx((4 * 16 * 12 * 12 + t * k) / (t * (c + k)))
    assert cached["4"] == pytest.approx(1.0)  # pointwise: the product's matrices are the tensors


def test_time_of_weight_gradients_counts_once_and_only_there():
    def slower(gpu, dtype, gemms):
        rows = 40  # only a weight gradient sums over the batch
        twice = {g: 2.0 if g.k == rows else 1.0 for g in gemms}
        return {g: (Kernel(1e-3 * factor, 0.0, 0.0, 0.0),) for g, factor in twice.items()}

    def even(gpu, dtype, gemms):
        return {g: (Kernel(1e-3, 0.0, 0.0, 0.0),) for g in gemms}

    work = work_of(STACK)
    once, twice = step_of(work, even), step_of(work, slower)
    assert twice.wgrads == {name: 2 * seconds for name, seconds in once.wgrads.items()}
    assert (twice.forward, twice.dgrad) == (once.forward, once.dgrad)
    assert twice.dense == pytest.approx(once.dense + 3e-3)
    assert twice.shares().wgrad > once.shares().wgrad


def test_the_product_of_each_strategy_has_its_rows():
    t, c, k, n = 40, 96, 64, 18
    work = work_of(STACK)
    boundless = Gpu("", bandwidth=1e30, tensor_flops=1e30, vector_flops=1e30)
    step = step_of(work, gpu=boundless, active={layer.name: {n} for layer in work.layers})
    for strategy, rows in ((Strategy.DENSE, k), (Strategy.PACK, 20), (Strategy.FUSED, n)):
        seconds = step.wgrad(work.layers[0], n, strategy).seconds
        assert seconds == pytest.approx(2 * rows * c * t / 1e12 + LAUNCH)


def test_the_first_layer_has_no_input_gradient():
    step = step_of(
        work_of(STACK), lambda gpu, dtype, gemms: dict.fromkeys(gemms, (Kernel(1.0, 0, 0, 0),))
    )
    assert (len(step.wgrads), step.dgrad) == (3, 2.0)


def test_the_best_kernel_counts_and_none_outruns_the_memory():
    work = work_of(STACK)
    candidates = (Kernel(3.0, 1.0, 0.5, 0.25), Kernel(1.0, 2.0, 0.5, 0.25), Kernel(9, 9, 9, 9))
    step = step_of(work, lambda gpu, dtype, gemms: dict.fromkeys(gemms, candidates))
    assert set(step.wgrads.values()) == {2.75}
    slow = step_of(work, free, gpu=UNIT)
    assert slow.wgrads["0"] == pytest.approx(BYTES * 40 * (96 + 64) + LAUNCH)


def test_bytes_of_each_strategy():
    t, c, k, n = 40, 96, 64, 18
    work = work_of(STACK)
    layer = work.layers[0]
    assert layer.problem.weight_size == (k, c)
    step = step_of(work, free, gpu=UNIT, active={each.name: {n} for each in work.layers})
    product = BYTES * (t * c + t * 20)  # BLAS gets rows by the four
    moved = BYTES * (t * k * occupied(layer, n) + t * 20 + n * c + k * c)
    packed = step.wgrad(layer, n, Strategy.PACK)
    assert packed.mask_bytes == pytest.approx(moved)
    assert packed.seconds == pytest.approx(product + moved + LAUNCH)
    dense = step.wgrad(layer, n, Strategy.DENSE)
    assert dense.mask_bytes == BYTES * (k - n) * c
    assert dense.seconds == pytest.approx(step.wgrads[layer.name] + dense.mask_bytes)
    fused = step.wgrad(layer, n, Strategy.FUSED)
    read = BYTES * (t * c + t * k * occupied(layer, n))
    assert fused.seconds == pytest.approx(read + BYTES * k * c + LAUNCH)
    assert step.wgrad(layer, k, Strategy.PACK).seconds == step.wgrads[layer.name]


def test_depthwise_convolutions_are_counted_in_bytes():
    work = work_of(CONVS, "nhwc")
    (layer,) = (each for each in work.layers if each.is_grouped)
    step = step_of(work, free, gpu=UNIT)
    size = BYTES * 4 * 64 * 6 * 6
    weight = BYTES * 64 * 49
    assert step.wgrads[layer.name] == 2 * size + weight
    n = 8
    expected = 2 * size * occupied(layer, n) + weight
    assert step.wgrad(layer, n, Strategy.FUSED).seconds == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected DENSE or FUSED"):
        step.wgrad(layer, n, Strategy.PACK)
    slow = Gpu("", bandwidth=1e30, tensor_flops=1e30, vector_flops=1.0)
    assert step_of(work, free, gpu=slow).wgrads[layer.name] == 2 * 4 * 64 * 6 * 6 * 49


def test_strategies_are_the_library_s_own_or_the_fastest():
    work = work_of(STACK)
    step = step_of(work, active={layer.name: {8, 18, 60} for layer in work.layers})
    layer = work.layers[1]
    own = [own_choice(step, layer, n) for n in (8, 18, 60)]
    assert own == [Strategy.FUSED, Strategy.PACK, Strategy.DENSE]
    for n in (8, 18, 60):
        fastest = min(step.wgrad(layer, n, strategy).seconds for strategy in Strategy)
        assert step.wgrad(layer, n, best_choice(step, layer, n)).seconds == fastest
    row = predictions(CONVS, shares=(0.5,), layout="nhwc")[0]
    counts = [row[f"predicted_layers_{name}"] for name in ("dense", "pack", "fused")]
    assert counts == [2, 0, 2]  # fused: the depthwise one, and the head's 5 neurons


def test_a_layer_that_packing_slows_down_is_reported():
    def grudging(gpu, dtype, gemms):
        return {g: (Kernel(0.0, 0.0, 0.0, 1.0),) for g in gemms}

    row = predictions(STACK, grudging, shares=(0.5,))[1]
    assert row["assumptions"] == "pessimistic"
    assert row["predicted_layers_slower_than_dense"] == 3
    assert row["predicted_speedup"] < 0.9
    assert row["predicted_speedup_best_strategies"] > row["predicted_speedup"]
    assert predictions(STACK, shares=(1.0,))[0]["predicted_layers_slower_than_dense"] == 0


def test_attention_is_fused_and_its_projections_stay_dense():
    work = work_of(ATTENDING)
    n, s, d = 3, 5, 64
    (attention,) = work.attention
    assert attention == (2 * n * s * s * d, 4 * BYTES * n * s * d)
    projections = {layer.name: layer.problem for layer in work.layers if "attention" in layer.name}
    assert projections["attention.in_proj"].input_size == (n * s, d)
    assert projections["attention.in_proj"].weight_size == (3 * d, d)
    assert projections["attention.out_proj"].input_size == (n * s, d)
    row = predictions(ATTENDING, shares=(0.02,))[0]
    assert row["predicted_layers_dense"] == 2
    busy = Gpu("", bandwidth=1e30, tensor_flops=1.0, vector_flops=1e30)
    step = step_of(work, free, gpu=busy)
    assert step.forward == pytest.approx(2 * attention.product_flops, rel=1e-3)
    assert step.other_backward == pytest.approx(5 * attention.product_flops)


def test_optimizer_leaves_frozen_parameters_out():
    work = work_of(STACK)
    assert work.parameters == 97 * 64 + 65 * 128 + 129 * 10
    step = step_of(work, free, gpu=UNIT)
    assert step.optimizer == 5 * BYTES * work.parameters
    wgrads = step.wgrads
    assert step.seconds(wgrads, 0.25) == pytest.approx(step.dense - 0.25 * step.optimizer)


def test_every_model_of_the_step_benchmark_has_a_batch_for_gpus():
    assert set(predict.BATCHES) == set(CASES)
    for name in predict.BATCHES:
        case, layout = predict.case_for_gpu(name)
        assert layout in CASES[name].layouts
        assert case.images > CASES[name].images
        assert case.shape[0] == CASES[name].shape[0]


def test_everything_that_is_predicted_says_so(package, tmp_path, capsys):
    assert predict.main(["--out", str(tmp_path), "--r", "1", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing here was timed on a GPU") == 2
    header, rows = load(tmp_path / "predict.jsonl")
    assert "nothing here was timed on a GPU" in header["settings"]["notice"]
    assert [row["model"] for row in rows] == ["tiny"] * 8 + ["stack"] * 8
    table = list(csv.DictReader((tmp_path / "predict.csv").read_text().splitlines()[1:]))
    for names in (*rows, *table):
        assert all(name.startswith("predicted") for name in set(names) - ABOUT)
    assert {row["predicted_by"] for row in table} == {"somebody's predictor 1"}
    titles = [title for title, _ in predict.COLUMNS if title.lower() not in ABOUT]
    assert titles
    assert all("predicted" in title for title in titles)


def test_page_and_picture_come_from_the_csv_alone(package, tmp_path, monkeypatch, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results"
    monkeypatch.setattr(predict_page, "PAGE", page)
    monkeypatch.setattr(predict_page, "RESULTS", results)
    assert predict.main(["--out", str(tmp_path), "--models", "stack"]) == 0
    page.write_text("no place\n")
    assert predict.main(["--out", str(tmp_path), "--publish"]) == 2
    assert "expected the lines" in capsys.readouterr().err
    assert not results.exists()
    page.write_text(f"before\n{predict_page.BEGIN}old\n{predict_page.END}after\n")
    monkeypatch.setattr(matmul, "unavailable", lambda: "missing")  # publishing predicts nothing
    assert predict.main(["--out", str(tmp_path), "--publish"]) == 0

    rows = predict_page.read_csv(results / "predict.csv")
    expected = predict_page.page_table(rows)
    text = page.read_text()
    assert text == f"before\n{predict_page.BEGIN}{expected}{predict_page.END}after\n"
    title, _, *lines = expected.splitlines()
    assert title.count("predicted at r = ") == len(SHARES) - 1
    low, high = (
        next(
            row
            for row in rows
            if (row["gpu"], row["r"], row["assumptions"]) == ("H100", 0.25, assumptions)
        )
        for assumptions in ("pessimistic", "optimistic")
    )
    cell = (
        f"{low['predicted_speedup']:.2f}–{high['predicted_speedup']:.2f} "
        f"/ {high['predicted_speedup_best_strategies']:.2f} ({high['predicted_bound_floor']:.2f})"
    )
    assert lines[1].split(" | ")[3] == cell
    assert (results / "predicted_speedups.png").read_bytes().startswith(b"\x89PNG")


def test_titles_of_the_picture_say_predicted(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict_page.plt, "close", drawn.append)
    predict_page.draw(predictions(STACK), tmp_path / "picture.png")
    (figure,) = drawn
    assert figure.get_suptitle() == predict_page.NOTICE
    axis, legend = figure.axes[0], figure.axes[1].get_legend()
    assert "predicted" in axis.get_title(loc="left")
    assert "predicted" in axis.get_ylabel()
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 2 * len(GPUS)
    assert all("predicted" in label for label in labels)
    row = predictions(STACK)[len(SHARES) - 1]
    line = axis.get_lines()[0]
    assert line.get_ydata()[-1] == row["predicted_speedup"]


def test_missing_package_names_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matmul.importlib.util, "find_spec", lambda name: None)
    assert predict.main(["--out", str(tmp_path)]) == 2
    assert "pip install nvidia-matmul-heuristics" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # an older record is still there
    with pytest.raises(RuntimeError, match="pip install nvidia-matmul-heuristics"):
        matmul.ask("H100_SXM", "bf16", [])


@pytest.mark.parametrize(
    "arguments",
    [["--r", "0"], ["--r", "2"], ["--models", "none"], ["--gpus", "V100"], ["--dtype", "int8"]],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(arguments)
    assert stop.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_publishing_without_a_run(tmp_path, capsys):
    assert predict.main(["--out", str(tmp_path), "--publish"]) == 2
    assert "predict.jsonl" in capsys.readouterr().err


def test_table_of_the_page_is_that_of_the_committed_csv():
    rows = predict_page.read_csv(predict_page.RESULTS / "predict.csv")
    assert predict_page.page_table(rows) in predict_page.PAGE.read_text()
