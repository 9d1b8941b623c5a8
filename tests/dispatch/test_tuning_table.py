"""The table of measured strategies: what it tells apart, keeps, ignores and gives back."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import neq_kernels as neq
from neq_kernels.backends.aten import Aten
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.dispatch import (
    autotune,
    selection,
    stopwatch,
    trial,
    tuning_table,
)
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.tuning_table import TuningTable, count_bucket, key
from neq_kernels.doctor import runner

CONV = Problem(
    (2, 8, 6, 6),
    (16, 8, 3, 3),
    ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    False,
    torch.float32,
)
LINEAR = Problem((32, 8), (16, 8), None, False, torch.float32)
ABOUT = {"cpu": "a", "threads": 2}
CUSTOM, PACK = KernelChoice(Strategy.CUSTOM), KernelChoice(Strategy.PACK)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning_table.DIRECTORY_VARIABLE, str(tmp_path))
    selector.forget()
    yield tmp_path
    selector.forget()


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
    cpu, gpu = selector.context("cpu"), selection.ExecutionContext(("triton",), "cuda", 0)
    selector.table(cpu).put(CONV, 4, PACK)
    assert selector.table(gpu).get(CONV, 4) is None
    assert selector.table(gpu._replace(backends=("aten",))).get(CONV, 4) is None


def test_settings_are_followed_where_the_kernel_has_them():
    place = selection.ExecutionContext(("triton",), "cuda", 0)
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


GPU = selection.ExecutionContext(("cuda", "triton", "aten"), "cuda", 0)
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


def test_tune_measures_every_layer_and_keeps_the_winners(own_folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6))
    before = [p.clone() for p in model.parameters()]
    winners = neq.tune(model, torch.randn(2, 3, 6, 6), shares=[0.5, 1], seconds=0.001)
    assert {name: set(by_count) for name, by_count in winners.items()} == {
        "0": {4, 8},
        "3": {3, 6},
    }
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(list(own_folder.glob("*.json"))) == 1
    selector.forget()
    assert len(selector.table(selector.context("cpu"))) == 4


def test_tune_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="shares"):
        neq.tune(nn.Linear(2, 2), torch.randn(1, 2), shares=[0.0])
    with pytest.raises(ValueError, match="expected linear layers"):
        neq.tune(nn.ReLU(), torch.randn(1, 2))
    with pytest.raises(ValueError, match="on the CPU or on one GPU"):
        neq.tune(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))


def test_measuring_on_the_fly_is_asked_for_by_the_environment(monkeypatch):
    measured = []
    monkeypatch.setattr(
        autotune, "fastest", lambda problem, n, *_: measured.append((problem, n)) or PACK
    )
    place = selector.context("cpu")
    selector.choice(LINEAR, 3, place)
    assert measured == []
    selector.forget_choices()
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "1")
    for _ in range(3):
        assert selector.choice(LINEAR, 3, place) == PACK
    assert measured == [(LINEAR, 3)]
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "yes")
    selector.forget_choices()
    with pytest.raises(ValueError, match="expected 0 or 1"):
        selector.choice(LINEAR, 5, place)


@pytest.mark.parametrize("problem", [CONV, LINEAR])
def test_the_contest_runs_every_candidate(problem):
    ran = []

    class Counted(Aten):
        def conv_backward(self, *tensors, choice, **more):
            ran.append(choice.strategy)
            return super().conv_backward(*tensors, choice=PACK, **more)

        def linear_backward(self, *tensors, choice, **more):
            ran.append(choice.strategy)
            return super().linear_backward(*tensors, choice=PACK, **more)

    candidates = {KernelChoice(strategy): Counted() for strategy in Strategy}
    assert autotune.fastest(problem, 4, candidates, seconds=0.001) in candidates
    assert set(ran) == set(Strategy)


class WithSettings:
    """A backend whose kernel runs four ways: the second cannot be launched, the last one, which
    would be fastest, is wrong."""

    ways = tuple(KernelChoice(Strategy.CUSTOM, (number,)) for number in (1, 2, 3, 4))

    def __init__(self, clock):
        self._clock = clock

    def linear_backward(self, *tensors, choice, **more):
        settings = choice.settings
        if settings == (2,):
            raise RuntimeError("out of shared memory")
        self._clock.now += {(): 5.0, (1,): 3.0, (3,): 1.0, (4,): 0.5}[settings]
        gradient = torch.arange(1.0, 9.0)
        return (None, gradient if settings != (4,) else gradient.roll(1), None)


class FakeClock:
    """Stands still but for what calls add."""

    def __init__(self):
        self.now, self.flushed = 0.0, 0

    def flush(self):
        self.flushed += 1

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def synchronize(self):
        pass


def test_on_a_gpu_ways_compete_on_a_clock_and_the_wrong_is_passed_over(monkeypatch, caplog):
    clock = FakeClock()
    backend = WithSettings(clock)
    candidates = dict.fromkeys([KernelChoice(Strategy.DENSE), *WithSettings.ways], backend)
    monkeypatch.setattr(autotune, "operands", lambda problem, device: [torch.zeros(2, 2)] * 3)
    monkeypatch.setattr(trial.ActiveChannels, "on", lambda self, device: None)
    winner = autotune.fastest(LINEAR, 4, candidates, "cuda", 0.1, clock)
    assert winner == KernelChoice(Strategy.CUSTOM, (3,))
    assert clock.flushed > 0
    assert "out of shared memory" in caplog.text
    assert "(4,)" in caplog.text
    assert "its gradient is off by 7.00e+00" in caplog.text


def test_states_of_all_tables_are_kept_and_checked_before_any_is_used(monkeypatch):
    place = selector.context("cpu")
    gpu = selector.context("cuda")
    selector.table(place).put(CONV, 4, PACK)
    selector.table(gpu).put(LINEAR, 4, KernelChoice(Strategy.CUSTOM, (16, 32, 16, 4, 2, 1)))
    assert set(neq.tuning_state_dict()) == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    state = json.loads(json.dumps(neq.tuning_state_dict()))
    monkeypatch.undo()
    selector.table(place).put(CONV, 4, KernelChoice(Strategy.DENSE))
    selector.table(gpu).put(LINEAR, 4, KernelChoice(Strategy.DENSE))
    broken = {**state, "cuda": {"winners": {"x": "CUSTOM a"}}}
    for wrong in (broken, {"tpu": {}}, state["cpu"], [], None):
        with pytest.raises(ValueError, match="tuning: expected winners"):
            neq.load_tuning_state_dict(wrong)
        assert selector.table(place).get(CONV, 4) == KernelChoice(Strategy.DENSE)
    neq.load_tuning_state_dict(state)
    assert selector.table(place).get(CONV, 4) == PACK
    assert selector.table(gpu).get(LINEAR, 4).settings == (16, 32, 16, 4, 2, 1)


def test_a_checkpoint_of_other_backends_is_told_of(monkeypatch, caplog):
    state = json.loads(json.dumps(neq.tuning_state_dict()))
    neq.load_tuning_state_dict(state)
    assert caplog.text == ""
    state["cpu"]["backends"] = ["abacus"]
    state["cuda"] = {"winners": {}, "backends": ["cuda", "aten"]}  # of no device here
    neq.load_tuning_state_dict(state)
    now = list(selector.backends_for("cpu"))
    (record,) = caplog.records
    served = f"cpu tensors were served by ['abacus'], now by {now}"
    assert record.getMessage() == f"tuning: {served}: bits may differ (see neq doctor)"


def test_no_way_packs_the_channels_of_groups_on_a_gpu():
    """How many each group has would have to be asked of it."""
    g = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 4)
    grouped = Problem((2, 16, 6, 6), (16, 4, 3, 3), g, False, torch.float32)
    strategies = {choice.strategy for choice in selector.candidates(grouped, 4, GPU)}
    assert strategies == {Strategy.DENSE, Strategy.CUSTOM}
    on_cpu = selector.candidates(grouped, 4, selector.context("cpu"))
    assert KernelChoice(Strategy.PACK) in on_cpu


def test_every_round_of_a_contest_has_an_order_of_its_own():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = stopwatch.in_turns(calls, seconds=60, most_rounds=40)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 40)
    orders = ["".join(seen[i : i + 3]) for i in range(3, 123, 3)]
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders)) == 6


@pytest.mark.parametrize("proved", [None, ()])
def test_tune_checks_the_kernels_of_a_gpu_where_that_was_never_done(monkeypatch, proved):
    """On parameters without data, of a GPU that is not there."""
    module = importlib.import_module("neq_kernels.model_tuning")
    checked, measured = [], []
    monkeypatch.setattr(selector.verified, "names", lambda: proved)
    monkeypatch.setattr(runner, "prove", lambda: checked.append(True))
    monkeypatch.setattr(module, "problems_of", lambda *_: {"0": LINEAR})
    monkeypatch.setattr(module, "CudaClock", lambda device: None)
    monkeypatch.setattr(
        autotune,
        "fastest",
        lambda p, n, possible, *_: (measured.append(n), next(iter(possible)))[1],
    )
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(8, 16, device="cuda"))
        winners = neq.tune(model, shares=[0.5])
    assert winners == {"0": {8: KernelChoice(Strategy.DENSE)}}
    assert measured == [8]
    assert checked == ([True] if proved is None else [])
