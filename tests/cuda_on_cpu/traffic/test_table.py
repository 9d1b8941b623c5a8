"""What kernels move, by the operators and the launchers themselves."""

import csv
import dataclasses

import pytest
import torch

from tests.cuda_on_cpu.traffic import __main__ as traffic
from tests.cuda_on_cpu.traffic import counted
from tests.cuda_on_cpu.traffic.operations import (
    BF16,
    OPERATIONS,
    Outcome,
    _linear,
    _pack,
    cases,
    sectors,
)


def test_sectors():
    rows = torch.zeros(4, 32, dtype=BF16)  # two sectors each
    assert sectors(rows) == 8
    assert sectors(rows, lambda offsets: offsets[:, [3]]) == 4
    assert sectors(rows, lambda offsets: offsets[:2, [0, 15, 16]]) == 4
    assert sectors(rows.view(1, 32, 2, 2), lambda offsets: offsets[:, [0, 1, 2, 3]]) == 1


def test_every_operation_has_cases_whose_names_differ():
    found = list(cases())
    assert {case.operation for case in found} == set(OPERATIONS)
    names = {(c.operation, c.dtype, c.shape, c.active) for c in found}
    assert len(names) == len(found)
    assert traffic.GATES.keys() <= set(OPERATIONS)


def blocks(t):
    """Each packs six steps, where there are not too many."""
    return -(-t // (6 * counted.function("neq_cuda_pack_rows")()))


def test_a_pack_by_hand():
    """128 rows of 512 channels."""
    case = _pack(BF16, 128, 512, 3, transposed=False)
    row = traffic.row(case)
    active = case.order[:3]
    needed = len((active // 16).unique())
    # What is packed has rows of 16 bytes, two to a sector.
    assert row["least_bytes"] == 32 * (128 * needed + 64)
    assert row["moved_bytes"] >= row["least_bytes"]
    assert row["launches"].startswith(f"pack_kernel {blocks(128)}: ")
    assert row["index_bytes"] > 0
    assert not row["fails"].startswith("wrong")


def test_products_are_cut_as_on_an_h100_and_right():
    row = traffic.row(_linear("linear few rows", BF16, 2048, 64, 1024, 8))
    # Packed first, as two tiles share the columns; a part has seven steps of 16 rows.
    kernels = [launch.split(":")[0] for launch in row["launches"].split("; ")]
    assert kernels == [f"pack_kernel {blocks(2048)}", "wgrad_kernel 2x19", "finish_kernel 64"]
    # Written, and read again.
    assert row["sums_bytes"] == pytest.approx(2 * 19 * 8 * 1025 * 4, rel=0.01)
    assert row["least_bytes"] == pytest.approx(
        2 * 2048 * 1024 + 32 * 2048 * 4 + 2 * 64 * 1025, rel=0.01
    )
    assert "wrong" not in row["fails"]


def test_a_fault_of_the_emulator_names_the_operation():
    rows = torch.zeros(4, 8, dtype=torch.float16)  # which this build leaves out
    order, count = torch.arange(8), torch.tensor([1], dtype=torch.int32)
    reads = {"rows": rows, "order": order, "count": count}
    with pytest.raises(RuntimeError, match="neq_kernels pack"):
        counted.counted(
            lambda: counted.operators().pack(rows, order, count, 1, False, False), reads, {}
        )


def planted(case, outcome, monkeypatch):
    case = dataclasses.replace(case, run=lambda _: outcome)
    monkeypatch.setattr(traffic, "cases", lambda: [case])


@pytest.mark.parametrize(
    ("moved", "is_right", "fails"),
    [(110, True, ""), (111, True, "moves too much"), (100, False, "wrong")],
)
def test_gates(moved, is_right, fails, tmp_path, monkeypatch, capsys):
    launch = counted.Moved("pack_kernel", (4,), 2, moved, 64, 10, 0)
    outcome = Outcome([launch], 100, is_right)
    planted(_pack(BF16, 64, 64, 8, False), outcome, monkeypatch)
    monkeypatch.setattr(traffic, "TABLE", tmp_path / "results" / "traffic.csv")
    assert traffic.main(["--out", str(tmp_path), "--publish"]) == (1 if fails else 0)
    assert f"{int(bool(fails))} fail" in capsys.readouterr().out
    with open(tmp_path / "results" / "traffic.csv") as file:
        file.readline()
        (row,) = csv.DictReader(file)
    assert row["fails"] == fails
    assert row["launches"] == f"pack_kernel 4: {moved}"
    assert float(row["bytes_per_request"]) == 32


@pytest.mark.parametrize(
    ("operation", "least", "fails"),
    [
        ("linear few rows", 100, ""),
        ("linear few rows", traffic.LARGER_THAN_L2, "moves too much"),
        ("pack", 100, "moves too much"),
    ],
)
def test_sums_count_but_for_few_rows_of_short_reductions(operation, least, fails, monkeypatch):
    case = _linear(operation, BF16, 64, 64, 64, 8)
    launch = counted.Moved("wgrad_kernel", (4,), 2, least + least // 5, 64, 10, least // 5)
    planted(case, Outcome([launch], least, True), monkeypatch)
    (row,) = traffic.rows([operation])
    assert (row["moved_bytes"], row["sums_bytes"]) == (least, least // 5)
    assert row["ratio_with_sums"] == pytest.approx(1.2)
    assert row["fails"] == fails


def test_sums_that_do_not_stay_in_l2_fail(monkeypatch):
    case = _linear("linear few rows", BF16, 64, 64, 64, 8)
    for sums, fails in ((2 * traffic.MOST_SUMS_BYTES, ""), (2**26, "sums leave L2")):
        launch = counted.Moved("wgrad_kernel", (4,), 2, sums + 100, 64, 10, sums)
        planted(case, Outcome([launch], 100, True), monkeypatch)
        (row,) = traffic.rows(["linear few rows"])
        assert row["fails"] == fails


def test_outside_of_a_checkout_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda _: None)
    assert traffic.main([]) == 2
    assert "root of a checkout" in capsys.readouterr().err
