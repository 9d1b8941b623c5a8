"""Step times: bookkeeping, interleaving, restoration. What the clock says is never asserted."""

from __future__ import annotations

import copy
import gc
import itertools
import json

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.measure.timing import (
    PHASES,
    PhaseClock,
    Quantiles,
    StepTime,
    StepTimes,
    Variant,
    step_time,
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())


def mean_output(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).pow(2).mean()


def with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


BATCHES = [torch.full((2, 2, 5, 5), float(i)) for i in range(1, 4)]


@pytest.fixture
def ticking(monkeypatch):
    """A clock that advances by one second at each reading."""
    seconds = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))


def test_quantiles_interpolate():
    assert Quantiles.of([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == Quantiles(1.0, 2.5, 4.0)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="samples"):
        Quantiles.of([])


def test_clock_charges_each_phase_with_its_own_time(ticking):
    clock = PhaseClock()
    for _ in range(2):
        with clock.phase("forward"):
            pass
    with clock.phase("backward"), clock.phase("inner"):
        pass
    assert clock.samples == {"forward": [1.0, 1.0], "inner": [1.0], "backward": [3.0]}
    assert clock.totals() == {"forward": 2.0, "inner": 1.0, "backward": 3.0}


def test_clock_does_not_record_a_phase_that_failed():
    clock = PhaseClock()
    with pytest.raises(RuntimeError, match="planted"), clock.phase("forward"):
        raise RuntimeError("planted")
    assert clock.samples == {}


def test_every_phase_of_every_round_is_recorded(ticking):
    model = net()
    times = step_time(
        [Variant("a", model, mean_output, with_momentum(model)), Variant("b", net(), mean_output)],
        BATCHES,
        warmup=2,
        repeats=5,
    )
    assert [v.name for v in times.variants] == ["a", "b"]
    for variant in times.variants:
        assert all(len(getattr(variant, phase)) == 5 for phase in PHASES)
        assert variant.total == (3.0,) * 5
        assert variant.quantiles("forward") == Quantiles(1.0, 1.0, 1.0)


def test_every_round_has_an_order_of_its_own_and_the_next_batch():
    seen = []

    def loss(name):
        def run(model, batch):
            seen.append((name, int(batch.flatten()[0])))
            return mean_output(model, batch)

        return run

    step_time([Variant(n, net(), loss(n)) for n in "abc"], BATCHES, warmup=1, repeats=29)
    rounds = [seen[i : i + 3] for i in range(0, 90, 3)]
    assert [{batch for _, batch in turn} for turn in rounds] == [{i % 3 + 1} for i in range(30)]
    orders = ["".join(name for name, _ in turn) for turn in rounds]
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders)) == 6


def test_everything_is_put_back():
    model = net()
    optimizer = with_momentum(model)
    mean_output(model, BATCHES[0]).backward()
    optimizer.step()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    state, momentum = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    step_time(Variant("a", model, mean_output, optimizer), BATCHES, warmup=1, repeats=2)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    for key, entry in momentum["state"].items():
        assert torch.equal(after[key]["momentum_buffer"], entry["momentum_buffer"])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert gc.isenabled()


def test_a_step_that_fails_puts_everything_back_too():
    model = net()
    state = copy.deepcopy(model.state_dict())

    def fails_late(model, batch):
        if batch is BATCHES[2]:
            raise RuntimeError("planted")
        return mean_output(model, batch)

    with pytest.raises(RuntimeError, match="planted"):
        step_time(Variant("a", model, fails_late, with_momentum(model)), BATCHES)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert gc.isenabled()


def measured() -> StepTimes:
    slow = StepTime("slow", (1.0, 2.0), (2.0, 4.0), (1.0, 2.0))
    fast = StepTime("fast", (1.0, 2.0), (0.5, 1.0), (0.5, 1.0))
    return StepTimes((slow, fast))


def test_speedup_is_the_ratio_within_a_round():
    assert measured().speedup("fast", over="slow") == Quantiles(2.0, 2.0, 2.0)
    assert measured().speedup("fast", over="slow", phase="backward") == Quantiles(4.0, 4.0, 4.0)


def test_unknown_names_raise():
    with pytest.raises(KeyError, match="expected one of"):
        measured()["other"]
    with pytest.raises(ValueError, match="phase: expected total"):
        measured().speedup("fast", over="slow", phase="sideways")


def test_results_are_json_with_machine_and_threads():
    saved = json.loads(json.dumps(measured().to_dict()))
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["threads"] == torch.get_num_threads()
    assert saved["variants"][0]["quantiles"]["total"]["median"] == 6.0
    assert saved["variants"][1]["backward"] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": []}, "variants"),
        ({"variants": [Variant("a", net(), mean_output)] * 2}, "distinct names"),
        ({"batches": []}, "batches"),
        ({"warmup": -1}, "warmup"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_bad_arguments_raise(arguments, message):
    arguments = {"variants": Variant("a", net(), mean_output), "batches": BATCHES} | arguments
    with pytest.raises(ValueError, match=message):
        step_time(**arguments)


def test_an_attached_optimizer_and_its_frozen_rows_come_back():
    model = neq.convert(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    neq.attach(optimizer, model)
    model[0].channels.set([0, 2])
    for _ in range(2):
        mean_output(model, BATCHES[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    step_time(Variant("a", model, mean_output, optimizer), BATCHES, warmup=0, repeats=2)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for key, entry in optimizer.state_dict()["state"].items():
        assert entry.keys() == state["state"][key].keys()
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][key][name]))
