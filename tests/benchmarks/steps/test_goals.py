"""What steps are held to."""

from __future__ import annotations

import pytest

from benchmarks.steps import goals


def row(model="m", r=0.25, speedup=1.2, of_bound=1.0, **about):
    figures = {"speedup_median": speedup, "ratio_floor": of_bound, "wide": False}
    cell = {"model": model, "layout": "nchw", "dtype": "float32", "r": r, "provider": "neq"}
    return {**cell, **figures, **about}


def verdicts(rows):
    return {each.goal.removeprefix("float32: "): each for each in goals.judge(rows)}


MEAN = "of the bound with floor, geomean >= 0.97"
WORST = "of the bound with floor, no cell < 0.9"
ALL, HALF = (f"r = {r:g}, never < 0.97 of dense" for r in (1, 0.5))
WIDE = "95 % interval of the speed-up at most 6 % wide"


def test_good_steps_pass():
    found = verdicts([row(), row(r=1, speedup=0.97, of_bound=0.97), row(r=0.5, of_bound=0.95)])
    assert set(found) == {MEAN, WORST, ALL, HALF, WIDE}
    assert all(each.passes for each in found.values())
    assert not any(line.startswith("red") for line in goals.summary([row()]))


@pytest.mark.parametrize(
    ("bad", "failed"),
    [
        (row(of_bound=0.899), {MEAN, WORST}),
        (row(of_bound=0.91), {MEAN}),
        (row(r=1, speedup=0.969), {ALL}),
        (row(r=0.5, speedup=0.969), {HALF}),
        (row(r=0.1, speedup=0.5), set()),
        (row(wide=True), {WIDE}),
    ],
)
def test_each_goal_can_fail(bad, failed):
    found = verdicts([bad, row(r=1), row(r=0.5)])
    assert {name for name, each in found.items() if not each.passes} == failed
    red = [line for line in goals.summary([bad]) if line.startswith("red")]
    assert red == (["red cells: 1 of 1"] if failed & {WORST, ALL, HALF} else [])


def test_other_providers_and_wrong_rows_are_not_judged():
    others = [row(provider="peer1", of_bound=0.1), {**row(), "error": "wrong"}]
    del others[1]["ratio_floor"]
    assert list(goals.judge(others)) == []


def test_dtypes_are_judged_apart():
    rows = [row(), row(dtype="bfloat16", of_bound=0.5)]
    lines = list(goals.summary(rows))
    assert f"PASS  float32: {MEAN}: 1.000 over 1 cells" in lines
    assert f"FAIL  bfloat16: {MEAN}: 0.500 over 1 cells" in lines
    assert lines[-2:] == [
        "red cells: 1 of 2",
        "  m nchw bfloat16 r=0.25: 0.500 of the bound with floor",
    ]


def test_records_of_version_0_1():
    old = row()
    del old["wide"], old["dtype"]
    assert set(verdicts([old])) == {MEAN, WORST}
    assert goals.name_of(old) == "m nchw float32 r=0.25"
