"""The checks of a model: right where all is right, and each of them can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq_kernels as neq
from benchmarks.zoo.checks import CHECKS, check
from benchmarks.zoo.comparison import Example, freeze_half
from neq_kernels.layers.traversal import neuron_owners


class Net(nn.Module):
    """Every parameter belongs to a neuron but a scale, low down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(F.gelu(self.first(x)))))


def example(model: nn.Module | None = None) -> Example:
    return Example(model or Net(), (torch.randn(3, 6),))


def row_of(build: Callable[[], Example] = example) -> dict[str, Any]:
    return check(build)


def test_a_model_that_is_right() -> None:
    row = row_of()
    assert all(row[name] is True for name in CHECKS), row
    assert row["dtype"] == "float64"
    assert row["mac_share"] == 1
    assert row["parameters"] == sum(p.numel() for p in Net().parameters())
    assert row["reason"] == ""
    # The first two of four layers are frozen: what is left is the last one's.
    assert row["dgrad"] == row["dgrad_needed"] == 8 * 4 / (8 * 8 + 8 * 4)


def test_a_row_says_which_products_are_outside() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.mix

    row = row_of(lambda: example(Mixed()))
    assert row["mac_share"] == 1 - 16 / (6 * 8 + 8 * 8 + 8 * 4 + 16)
    assert row["reason"] == "MACs outside: mix has most, 10% of all"


def test_half_of_every_layer_is_frozen_and_ties_agree() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    net[1].weight = net[0].weight
    frozen = freeze_half(neq.convert(net))
    assert [len(rows) for rows in frozen.values()] == [3, 3, 3, 0, 0]
    assert torch.equal(net[0].channels.mask, net[1].channels.mask)
    assert set(frozen) == set(neuron_owners(net))


class Bypassed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.read_elsewhere = [self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x), *self.read_elsewhere))


def test_a_layer_that_is_bypassed() -> None:
    row = row_of(lambda: example(Bypassed()))
    assert row["frozen"] is False
    assert "second.weight" in row["reason"]
    assert row["forward"]
    assert row["gradients"]


class Rooted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


def planted(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    """What ``convert`` returns is spoilt."""
    convert = neq.convert

    def spoilt(model: nn.Module, **options: Any) -> nn.Module:
        change(convert(model, **options))
        return model

    monkeypatch.setattr(neq, "convert", spoilt)


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    model.last.bias.add_(1e-12)


def scale_gradients(model: nn.Module) -> None:
    model.second.weight.register_hook(lambda gradient: gradient * (1 + 1e-7))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "forward": lambda patch: planted(patch, nudge),
    "gradients": lambda patch: planted(patch, scale_gradients),
    "sgd": lambda patch: patch.setattr(
        neq, "attach", lambda *_: type("", (), {"remove": lambda self: None})()
    ),
    "revert": lambda patch: patch.setattr(neq, "revert", lambda model: model),
}


@pytest.mark.parametrize("cell", FAULTS)
def test_each_check_can_fail(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[cell](monkeypatch)
    row = row_of()
    assert row[cell] is False, row
    assert f"{cell}: " in row["reason"]


def test_backprop_that_goes_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = neq.convert
    monkeypatch.setattr(neq, "convert", lambda model, others="train": convert(model))
    row = row_of(lambda: example(Rooted()))
    assert row["stop"] is False
    assert row["dgrad"] == 1 > row["dgrad_needed"]
    assert "stop: 100% of the input gradients are computed, " in row["reason"]


def test_an_exception_names_the_place_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> None:
        neq.FixedController(model, masks=1)

    planted(monkeypatch, fails)
    row = row_of()
    assert row["forward"] is False
    assert ".py:" in row["reason"]


class NoDouble(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + F.linear(x, torch.eye(6)))


class Undecided(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Undecided(), "differ by themselves"),
        (lambda: nn.Sequential(Net(), nn.Threshold(float("inf"), float("inf"))), "not finite"),
    ],
    ids=["not deterministic", "not finite"],
)
def test_what_cannot_be_checked_is_said(model: Callable[[], nn.Module], said: str) -> None:
    row = row_of(lambda: example(model()))
    assert said in row["reason"]
    assert "forward" not in row


def test_a_model_that_only_runs_in_float32() -> None:
    row = row_of(lambda: example(NoDouble()))
    assert row["dtype"] == "float32"
    assert all(row[name] is True for name in CHECKS), row


def test_what_cannot_be_built_is_a_row() -> None:
    def build() -> Example:
        raise ImportError("no such library")

    assert row_of(build) == {
        "built": False,
        "reason": "not built: ImportError: no such library",
    }


def test_zero_initialised_weights_hide_nothing() -> None:
    class Zero(Bypassed):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.last.weight)

    assert row_of(lambda: example(Zero()))["frozen"] is False


def test_models_that_keep_what_they_computed_can_be_copied() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    row = row_of(lambda: example(Keeps()))
    assert row["forward"], row
    assert copy.deepcopy(row) == row


def test_a_model_without_neurons_has_no_share() -> None:
    row = row_of(lambda: Example(nn.Sequential(nn.PReLU(), nn.PReLU()), (torch.randn(2, 3),)))
    assert row["mac_share"] == 0
    assert row["reason"] == "no layer of it can be converted"
    assert "forward" not in row


def test_gradients_that_are_not_finite_are_not_compared() -> None:
    class Root(Net):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0).sqrt()

    row = row_of(lambda: example(Root()))
    assert row["reason"] == "not checked: its gradients are not finite"
