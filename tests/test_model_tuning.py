"""neq.tune, and its measurements in a checkpoint."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import neq_kernels as neq
from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.dispatch import autotune
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import runner
from tests.support.tuning_problems import CONV, LINEAR, PACK

pytestmark = pytest.mark.usefixtures("own_folder")


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


def test_tune_takes_a_dict_of_keyword_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.of_a, self.of_b = nn.Linear(4, 6), nn.Linear(3, 6)

        def forward(self, a, *, b):
            return self.of_a(a) + self.of_b(b)

    example = {"b": torch.randn(2, 3), "a": torch.randn(2, 4)}
    assert set(neq.tune(Sum(), example, shares=[1], seconds=0.001)) == {"of_a", "of_b"}


def test_tune_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="shares"):
        neq.tune(nn.Linear(2, 2), torch.randn(1, 2), shares=[0.0])
    with pytest.raises(ValueError, match="expected linear layers"):
        neq.tune(nn.ReLU(), torch.randn(1, 2))
    with pytest.raises(ValueError, match="on the CPU or on one GPU"):
        neq.tune(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))


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
    served = f"cpu tensors were given to ['abacus'], now to {now}"
    assert record.getMessage() == f"tuning: {served}: bits may differ (see neq doctor)"


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


def test_a_state_of_0_1_0_still_holds():
    """It called the custom kernels fused."""
    name = "linear 4x8 6x8 contiguous float32 active<=2"
    neq.load_tuning_state_dict({"cpu": {"winners": {name: "FUSED"}}})
    assert neq.tuning_state_dict()["cpu"]["winners"] == {name: "CUSTOM"}


def test_a_self_check_leaves_the_winners_of_a_checkpoint_alone():
    state = {"cpu": {"winners": {"linear 4x8 6x8 contiguous float32 active<=2": "DENSE"}}}
    neq.load_tuning_state_dict(state)
    runner.prove([])
    assert neq.tuning_state_dict()["cpu"]["winners"] == state["cpu"]["winners"]
