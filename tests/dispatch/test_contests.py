"""Contests: gradients stay those of the predicted kernel, the winner serves after the next change
of masks, and what they may cost is bounded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.dispatch import contests, tuning_table
from neq_kernels.dispatch.contests import TURNS, Allowance, Contest
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.dispatch.selection import selector
from tests.support.oracle import channels_with
from tests.support.tuning_problems import CUSTOM, PACK

DENSE = KernelChoice(Strategy.DENSE)
ALL = [CUSTOM, PACK, DENSE]


class Kernels:
    """Stand-ins whose gradients tell them apart, on a clock that only they move."""

    def __init__(self, seconds):
        self.now, self.seconds, self.ran = 0.0, seconds, []

    def clock(self):
        return self.now

    def call_of(self, choice):
        def call(grad_output, input, weight, output_mask):
            self.ran.append((choice, tuple(output_mask)))
            if output_mask[1]:
                self.now += self.seconds[choice]
            if self.seconds[choice] == 13:
                raise RuntimeError("no memory")
            value = torch.tensor(float(choice.strategy))
            return tuple(value if wanted else None for wanted in output_mask)

        return call

    def contest(self, settle, allowance=None):
        allowance = allowance or Allowance(self.clock)
        return Contest(ALL, allowance, settle, self.clock)


@pytest.mark.parametrize("mask", [(True, True, True), (False, True, False), (True, True, False)])
@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ((3.0, 2.0, 1.0), DENSE),
        ((3.0, 1.0, 2.0), PACK),
        ((1.0, 2.0, 3.0), CUSTOM),
        ((1.0, 2.0, 1.02), DENSE),  # within the noise PyTorch's kernel wins
        ((1.0, 2.0, 1.05), CUSTOM),
    ],
)
def test_the_predicted_gradient_is_returned_and_the_fastest_wins(
    seconds, winner, mask, monkeypatch
):
    monkeypatch.setattr(contests, "ALLOWED_SECONDS", 1e9)
    kernels, settled = Kernels(dict(zip(ALL, seconds, strict=True))), []
    contest = kernels.contest(settled.append)
    tensors = (torch.zeros(1),) * 3
    while not contest.is_over:
        grads = contest.run(kernels.call_of, *tensors, mask)
        assert grads == tuple(torch.tensor(2.0) if wanted else None for wanted in mask)
    assert settled == [winner]
    measured = [choice for choice, asked in kernels.ran if asked == (False, True, mask[2])]
    assert all(measured.count(choice) >= TURNS for choice in ALL)
    kernels.ran.clear()
    contest.run(kernels.call_of, *tensors, mask)
    assert kernels.ran == [(CUSTOM, mask)]


def test_the_first_turn_of_each_is_not_counted(monkeypatch):
    monkeypatch.setattr(contests, "ALLOWED_SECONDS", 1e9)
    kernels, settled = Kernels({CUSTOM: 2.0, PACK: 3.0, DENSE: 100.0}), []
    contest = kernels.contest(settled.append)
    for _ in range(3):
        contest.run(kernels.call_of, *(torch.zeros(1),) * 3, (True, True, True))
    kernels.seconds[DENSE] = 1.0
    while not contest.is_over:
        contest.run(kernels.call_of, *(torch.zeros(1),) * 3, (True, True, True))
    assert settled == [DENSE]


def test_nothing_is_measured_beyond_the_allowance():
    kernels = Kernels(dict.fromkeys(ALL, 0.25))
    allowance = Allowance(kernels.clock)
    contest = kernels.contest(lambda winner: None, allowance)
    for _ in range(100):
        kernels.now += 1.0  # the rest of the step
        contest.run(kernels.call_of, *(torch.zeros(1),) * 3, (True, True, True))
        most = contests.ALLOWED_SECONDS + contests.ALLOWED_SHARE * kernels.now + 0.25
        assert allowance.spent <= most
    assert not contest.is_over
    assert 0.75 <= allowance.spent < 1.5


def test_a_bias_alone_is_no_reason_to_measure():
    kernels = Kernels(dict.fromkeys(ALL, 0.001))
    contest = kernels.contest(lambda winner: None)
    contest.run(kernels.call_of, *(torch.zeros(1),) * 3, (True, False, True))
    assert kernels.ran == [(CUSTOM, (True, False, True))]


def test_a_kernel_that_cannot_run_is_passed_over(monkeypatch, caplog):
    monkeypatch.setattr(contests, "ALLOWED_SECONDS", 1e9)
    kernels, settled = Kernels({CUSTOM: 2.0, PACK: 13, DENSE: 1.0}), []
    contest = kernels.contest(settled.append)
    while not contest.is_over:
        grads = contest.run(kernels.call_of, *(torch.zeros(1),) * 3, (True, True, True))
        assert grads[1] == 2.0
    assert settled == [DENSE]
    assert caplog.text.count("is passed over: no memory") == 1


# --- in the backward of layers -------------------------------------------------------------------


@pytest.fixture
def in_doubt(own_folder, monkeypatch):
    """The model never knows."""
    monkeypatch.setattr(contests, "ALLOWED_SECONDS", 1e9)
    monkeypatch.setattr(CostModel, "in_doubt", lambda *_: [Strategy.CUSTOM, *others])
    monkeypatch.setattr(CostModel, "strategy", lambda *_: Strategy.CUSTOM)
    others = [Strategy.PACK, Strategy.DENSE]


LAYERS = {
    "linear": (lambda: neq.nn.Linear(24, 16), (9, 24)),
    "conv": (lambda: neq.nn.Conv2d(5, 16, 3, padding=1), (2, 5, 6, 7)),
    "depthwise": (lambda: neq.nn.Conv2d(16, 16, 3, groups=16, bias=False), (2, 16, 6, 7)),
}
HALF = [True, False] * 8


def gradients(layer, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return [x.grad, *(p.grad for p in layer.parameters())]


def choice_in(arguments):
    return next(each for each in arguments if isinstance(each, KernelChoice))


@pytest.mark.usefixtures("in_doubt")
@pytest.mark.parametrize("name", LAYERS)
def test_a_contest_changes_no_bit_and_its_winner_serves_after_the_next_change(name, monkeypatch):
    make, size = LAYERS[name]
    torch.manual_seed(1)
    layer, x = make(), torch.randn(size)
    layer.channels.set(HALF)
    with selector.forced_strategy(Strategy.CUSTOM):
        expected = gradients(copy.deepcopy(layer), x)
    monkeypatch.setattr(Contest, "_winner", lambda self: PACK)
    used = []
    backend = selector.backends["cpu"]
    calls = "linear_call" if name == "linear" else "conv_call"
    right = getattr(backend, calls)
    monkeypatch.setattr(
        backend,
        calls,
        lambda *args: (used.append(choice_in(args).strategy), right(*args))[1],
    )
    for step in range(40):
        for gradient, exact in zip(gradients(layer, x), expected, strict=True):
            assert torch.equal(gradient, exact)
        assert bool(selector.contests) == (step < 3 * TURNS - 1)
    assert {*used} == {*Strategy}
    assert used[-1] == Strategy.CUSTOM
    place = selector.context("cpu")
    assert len(selector.table(place)) == 1
    layer.channels.reset()
    layer.channels.set(HALF)
    used.clear()
    gradients(layer, x)
    assert used == [Strategy.PACK]
    selector.forget()  # a later process finds it on disk
    layer.channels.reset()
    layer.channels.set(HALF)
    gradients(layer, x)
    assert used[-1] == Strategy.PACK


@pytest.mark.usefixtures("in_doubt")
def test_layers_of_one_problem_share_a_contest():
    layers = nn.Sequential(*[neq.nn.Linear(16, 16) for _ in range(3)])
    for i, layer in enumerate(layers):
        layer.channels.set(channels_with(HALF if i else HALF[::-1]).mask)
    for _ in range(TURNS):
        assert selector.contests or _ == 0
        gradients(layers, torch.randn(9, 16))
    assert not selector.contests
    assert len(selector.table(selector.context("cpu"))) == 1


@pytest.mark.usefixtures("in_doubt")
@pytest.mark.parametrize("off", ["never", "deterministic", "loaded", "forced"])
def test_where_nothing_is_measured(off, monkeypatch):
    if off == "never":
        monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "never")
    if off == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
    if off == "loaded":
        neq.load_tuning_state_dict(json.loads(json.dumps(neq.tuning_state_dict())))
    layer = neq.nn.Linear(16, 16)
    layer.channels.set(HALF)
    if off == "forced":
        with selector.forced_strategy(Strategy.PACK):
            gradients(layer, torch.randn(9, 16))
    else:
        gradients(layer, torch.randn(9, 16))
    assert not selector.contests


def test_where_the_model_is_sure_nothing_is_measured(own_folder):
    costs = selector.costs.model(selector.context("cpu"))
    problem = Problem((4096, 512), (512, 512), None, False, torch.float32)
    every = tuple(Strategy)
    assert costs.in_doubt(problem, 5, every) == [] or len(costs.in_doubt(problem, 5, every)) > 1
    sure = CostModel(
        "x",
        {
            "float32": {
                "dense linear rows": {"all products": 1.0},
                "pack linear rows": {"products": 1.0, "calls": 1.0},
                "custom linear rows": {"products": 1.0},
            }
        },
    )
    assert sure.in_doubt(problem, 5, every) == []
    assert sure.in_doubt(problem, 480, every) == [Strategy.DENSE, Strategy.CUSTOM]
    # With everything active PyTorch's own call is not replaced on a promise.
    faster = CostModel(
        "x",
        {
            "float32": {
                "dense linear rows": {"calls": 2.0},
                "pack linear rows": {"calls": 9.0},
                "custom linear rows": {"calls": 1.0},
            }
        },
    )
    assert faster.strategy(problem, 512, every) == Strategy.CUSTOM
    assert faster.in_doubt(problem, 512, every) == [Strategy.CUSTOM, Strategy.DENSE]
    # Where nobody measured, everything is measured in place, and PyTorch's kernels serve meanwhile.
    empty = CostModel()
    assert empty.strategy(problem, 5, every) == Strategy.PACK
    assert empty.in_doubt(problem, 5, every) == [Strategy.PACK, Strategy.DENSE, Strategy.CUSTOM]
    assert empty.strategy(problem, 512, every) == Strategy.DENSE
    assert empty.in_doubt(problem, 512, every) == [Strategy.DENSE, Strategy.CUSTOM]


@pytest.mark.usefixtures("own_folder")
def test_a_winner_holds_for_as_many_counts_as_the_costs_allow(monkeypatch):
    """Nearby numbers of active channels are not measured again."""
    model = CostModel(
        "x",
        {
            "float32": {
                "dense linear rows": {"all products": 1.0},
                "pack linear rows": {"calls": 1e9},
                "custom linear rows": {"products": 1.4},
            }
        },
    )
    problem = Problem((64, 64), (256, 64), None, False, torch.float32)
    monkeypatch.setattr(selector.costs, "model", lambda context: model)
    place = selector.context("cpu")
    # By the model the custom kernel wins up to .9 / 1.4 of the channels.
    assert selector.choice(problem, 164, place) == CUSTOM
    assert selector.choice(problem, 175, place) == DENSE
    table = selector.table(place)
    table.put(problem, 150, DENSE)
    selector.forget_choices()
    bucket = tuning_table.count_bucket(150, 256)
    assert bucket == 152
    assert selector.choice(problem, 150, place) == DENSE
    assert selector.choice(problem, 164, place) == DENSE
    assert selector.choice(problem, 134, place) == DENSE  # its lead shrinks by 152 / 134 = 1.13
    assert selector.choice(problem, 128, place) == CUSTOM  # 1.19; another bucket
    assert selector.choice(problem, 255, place) == DENSE
    # Of two the nearer one counts; with everything active, what was measured there alone.
    table.put(problem, 64, PACK)
    selector.forget_choices()
    assert selector.choice(problem, 60, place) == PACK
    assert selector.choice(problem, 256, place) == DENSE
    table.put(problem, 256, CUSTOM)
    selector.forget_choices()
    assert selector.choice(problem, 255, place) == DENSE
