"""The table of measured strategies: what it tells apart, keeps, ignores and gives back."""

from __future__ import annotations

import json

import pytest
import torch

import neq_kernels as neq
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.dispatch.execution_context import ExecutionContext
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.tuning_table import TuningTable, count_bucket, key
from tests.support.tuning_problems import CONV, CUSTOM, LINEAR, PACK

pytestmark = pytest.mark.usefixtures("own_folder")
ABOUT = {"cpu": "a", "threads": 2}


def test_counts_share_an_entry_four_to_the_doubling():
    assert [count_bucket(n, 64) for n in (0, 1, 2, 3, 4, 5, 6, 63, 64)] == [
        0, 1, 2, 3, 4, 5, 6, 63, 64
    ]  # fmt: skip
    assert count_bucket(33, 1000) == count_bucket(38, 1000) == 38
    assert count_bucket(39, 1000) == 45
    for k in (1, 2, 5, 100, 1000):
        buckets = [count_bucket(n, k) for n in range(k + 1)]
        assert buckets == sorted(buckets)
        assert all(n <= bucket <= k for n, bucket in enumerate(buckets))
        assert all(count_bucket(bucket, k) == bucket for bucket in buckets)
        assert buckets.count(k) == 1


def test_whatever_changes_the_work_changes_the_key():
    g = CONV.geometry
    assert g is not None
    others = [
        CONV._replace(input_size=(3, 8, 6, 6)),
        CONV._replace(weight_size=(16, 8, 1, 1)),
        CONV._replace(channels_last=True),
        CONV._replace(dtype=torch.float64),
        CONV._replace(geometry=ConvGeometry((2, 1), *list(vars(g).values())[1:])),
        CONV._replace(geometry=ConvGeometry(g.stride, g.padding, g.dilation, True, (0, 0), 1)),
        LINEAR,
    ]
    assert len({key(problem, 4) for problem in (CONV, *others)}) == 1 + len(others)
    assert key(CONV, 4) != key(CONV, 5)


def test_winners_survive_on_disk(tmp_path):
    table = TuningTable(tmp_path, ABOUT)
    table.put(CONV, 4, CUSTOM)
    table.put(LINEAR, 16, KernelChoice(Strategy.DENSE))
    path = table.save()
    assert path is not None
    assert not list(tmp_path.glob("*.tmp"))
    again = TuningTable(tmp_path, ABOUT)
    assert len(again) == 2
    assert again.get(CONV, 4) == CUSTOM
    assert again.get(CONV, 5) is None
    assert len(TuningTable(tmp_path, {**ABOUT, "threads": 1})) == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "measured_with": {"cpu": "b"}, "winners": {}}',
        '{"format": 99, "measured_with": {"cpu": "a", "threads": 2}, "winners": {}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "winners": {"x": "SLOWEST"}}',
        '{"format": 1, "measured_with": {"cpu": "a", "threads": 2}, "winners": 3}',
        "\x00\xff",
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning(tmp_path, caplog, content):
    table = TuningTable(tmp_path, ABOUT)
    table.put(CONV, 4, CUSTOM)
    path = table.save()
    assert path is not None
    path.write_text(content, encoding="latin-1")
    assert len(TuningTable(tmp_path, ABOUT)) == 0
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.text


def test_a_table_that_cannot_be_saved_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = TuningTable(tmp_path / "file" / "folder", ABOUT)
    table.put(CONV, 4, CUSTOM)
    assert table.save() is None
    assert "is not saved" in caplog.text
    assert table.get(CONV, 4) == CUSTOM


def test_a_checkpoint_brings_exactly_its_own_winners():
    table = TuningTable(None, ABOUT)
    table.put(CONV, 4, CUSTOM)
    state = json.loads(json.dumps(table.state_dict()))
    other = TuningTable(None, ABOUT)
    other.put(LINEAR, 3, PACK)
    other.load_state_dict(state)
    assert other.state_dict() == state
    with pytest.raises(ValueError, match="expected winners"):
        other.load_state_dict({"winners": {"x": "SLOWEST"}})
    assert other.state_dict() == state


def test_dispatch_follows_the_table():
    place = selector.context("cpu")
    for choice in selector.candidates(CONV, 4, place):
        selector.table(place).put(CONV, 4, choice)
        selector.forget_choices()
        assert selector.choice(CONV, 4, place) == choice


def test_a_winner_that_cannot_serve_is_not_used():
    place = selector.context("cpu")
    problem = CONV._replace(dtype=torch.bfloat16)
    selector.table(place).put(problem, 4, CUSTOM)
    assert selector.choice(problem, 4, place) != CUSTOM


def test_winners_of_the_cpu_are_none_of_a_gpu():
    cpu, gpu = selector.context("cpu"), ExecutionContext(("triton",), "cuda", 0)
    selector.table(cpu).put(CONV, 4, PACK)
    assert selector.table(gpu).get(CONV, 4) is None
    assert selector.table(gpu._replace(backends=("aten",))).get(CONV, 4) is None


def test_settings_are_followed_where_the_kernel_has_them():
    place = ExecutionContext(("triton",), "cuda", 0)
    possible = selector.candidates(LINEAR, 9, place)
    ways = [choice for choice in possible if choice.settings]
    assert len(ways) > 1
    for choice in (*ways, KernelChoice(Strategy.CUSTOM, (), "triton")):
        selector.table(place).put(LINEAR, 9, choice)
        selector.forget_choices()
        assert selector.choice(LINEAR, 9, place) == choice
    selector.table(place).put(LINEAR, 9, KernelChoice(Strategy.CUSTOM, (1, 2, 3), "triton"))
    selector.forget_choices()
    assert selector.choice(LINEAR, 9, place).settings == ()


GPU = ExecutionContext(("cuda", "triton", "aten"), "cuda", 0)


# Rows that no 16-byte vectors make up: the CUDA kernels do not serve them.
UNALIGNED = Problem((32, 9), (16, 9), None, False, torch.float16)


def test_on_a_gpu_the_table_says_which_backend_serves():
    possible = selector.candidates(LINEAR, 9, GPU)
    assert [c.backend for c in possible if c.strategy == Strategy.PACK] == list(GPU.backends)
    assert {c.backend for c in possible if c.strategy == Strategy.CUSTOM} == {"cuda", "triton"}
    assert [c for c in possible if c.strategy == Strategy.DENSE] == [KernelChoice(Strategy.DENSE)]
    for choice, module in possible.items():
        selector.table(GPU).put(LINEAR, 9, choice)
        selector.table(GPU).load_state_dict(selector.table(GPU).state_dict())
        selector.forget_choices()
        assert selector.choice(LINEAR, 9, GPU) == choice
        assert selector.backend_of(choice, GPU) is module
    for stranger in ("cpu", "cublas"):
        choice = KernelChoice(Strategy.CUSTOM, (), stranger)
        selector.table(GPU).put(LINEAR, 9, choice)
        selector.forget_choices()
        assert selector.choice(LINEAR, 9, GPU) != choice


def test_where_nothing_was_measured_the_first_backend_that_can_serves():
    chosen = selector.choice(LINEAR, 9, GPU)
    assert chosen == KernelChoice(Strategy.CUSTOM, (), "cuda")
    assert selector.choice(UNALIGNED, 9, GPU) == KernelChoice(Strategy.CUSTOM, (), "triton")
    wide = Problem((8192, 4096), (4096, 4096), None, False, torch.bfloat16)
    assert selector.choice(wide, 400, GPU) == KernelChoice(Strategy.PACK, (), "cuda")
    assert selector.choice(wide, 4000, GPU) == KernelChoice(Strategy.DENSE)
    alone = GPU._replace(backends=("triton",))
    assert selector.choice(LINEAR, 9, alone) == KernelChoice(Strategy.CUSTOM, (), "triton")


@pytest.mark.parametrize(("problem", "backend"), [(LINEAR, "cuda"), (UNALIGNED, "triton")])
def test_what_a_cuda_graph_replays_is_an_own_kernel_of_the_first_backend(
    problem, backend, monkeypatch
):
    monkeypatch.setattr(selector.rehearsal, "_rehearsed", {})
    with neq.capturable():
        choice = selector.choice_in_graph(problem, GPU, [True] * 3)
    assert choice == KernelChoice(Strategy.CUSTOM, (), backend)
    assert selector.choice_in_graph(problem, GPU, [True] * 3) == choice


def test_no_way_packs_the_channels_of_groups_on_a_gpu():
    """How many each group has would have to be asked of it."""
    g = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 4)
    grouped = Problem((2, 16, 6, 6), (16, 4, 3, 3), g, False, torch.float32)
    strategies = {choice.strategy for choice in selector.candidates(grouped, 4, GPU)}
    assert strategies == {Strategy.DENSE, Strategy.CUSTOM}
    on_cpu = selector.candidates(grouped, 4, selector.context("cpu"))
    assert KernelChoice(Strategy.PACK) in on_cpu
