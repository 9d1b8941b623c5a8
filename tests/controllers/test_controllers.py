"""What controllers share: tied weights, wrappers, history, bad arguments; Fixed and Stochastic."""

import json
import math

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.controllers import FixedController, NEqController, StochasticController
from tests.support.nets import conv_net, images, masks, picture, train, wiggle


class Twins(nn.Module):
    """``b`` and ``d`` share a weight; only ``b``'s inputs change when ``a`` does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.d.weight = self.b.weight
        neq.convert(self)

    def forward(self, x):
        return self.head(self.b(self.a(x)) + self.d(self.c(x)))


def test_layers_that_share_a_weight_are_active_if_any_wants_it():
    model = Twins()
    assert model.b.channels is model.d.channels
    controller = NEqController(model, [torch.randn(9, 4)], eps=0)
    with torch.no_grad():
        model.a.weight.mul_(torch.rand(4, 4))
        model.b.bias[1] += 1
    controller.step()
    phi = controller.response.phi
    assert bool((phi["b"] < 1).all())
    assert bool((phi["d"] == 1).all())
    found = masks(model)
    assert all(found["b"])
    assert all(found["d"])
    assert not any(found["c"])
    with torch.no_grad():
        model.d.bias[2] += 1
    for _ in range(3):
        controller.step()
    # mu = .5: the velocity of b fades but is not 0, d's neuron 2 moved and is not 0 either.
    assert all(masks(model)["b"])


def test_stochastic_draws_once_for_a_shared_weight():
    model = Twins()
    StochasticController(model, 0.5, warmup=0, seed=3)
    assert masks(model)["b"] == masks(model)["d"]
    assert sum(masks(model)["b"]) == 2


def test_fixed_unites_the_layers_that_are_named():
    model = Twins()
    FixedController(model, {"b": [0], "d": [2]})
    assert masks(model)["b"] == [True, False, True, False]
    model = Twins()
    FixedController(model, {"d": [2]})
    assert masks(model)["b"] == [False, False, True, False]
    assert all(masks(model)["a"])


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.99, 1.0])
def test_stochastic_freezes_exactly_int_p_k(p):
    model = conv_net()
    controller = StochasticController(model, p, seed=1)
    assert all(all(mask) for mask in masks(model).values())
    drawn = []
    for _ in range(4):
        controller.step()
        drawn.append(masks(model))
        for name, mask in drawn[-1].items():
            frozen = 0 if name == "9" else int(p * len(mask))
            assert len(mask) - sum(mask) == frozen
    if 0 < p < 1:
        assert len({json.dumps(d) for d in drawn}) > 1


def test_stochastic_reaches_every_neuron():
    model = conv_net()
    controller = StochasticController(model, 0.5)
    ever = {name: [False] * len(mask) for name, mask in masks(model).items()}
    for _ in range(30):
        controller.step()
        for name, mask in masks(model).items():
            ever[name] = [e or not on for e, on in zip(ever[name], mask, strict=True)]
    assert {name: all(mask) for name, mask in ever.items() if name != "9"} == dict.fromkeys(
        ["0", "1", "3", "4"], True
    )


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_stochastic_warmup(warmup):
    model = conv_net()
    controller = StochasticController(model, 0.5, warmup=warmup)
    trained_whole = []
    for _ in range(5):
        trained_whole.append(all(masks(model)["3"]))
        controller.step()
    assert trained_whole == [epoch < warmup for epoch in range(5)]


def test_stochastic_is_reproducible_and_draws_from_nobody_else():
    runs = []
    for seed, global_seed in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(global_seed)
        model = conv_net()
        before = picture(model)
        controller = StochasticController(model, 0.5, seed=seed)
        runs.append([])
        for _ in range(3):
            controller.step()
            runs[-1].append(masks(model))
        assert picture(model)["torch"] == before["torch"]
    assert runs[0] == runs[1] != runs[2]


def test_one_neuron_stays_active_when_all_are_drawn():
    model = conv_net()
    StochasticController(model, 1.0, warmup=0, include_output=True)
    active = [(name, k) for name, mask in masks(model).items() for k, on in enumerate(mask) if on]
    assert active == [("9", 0)]


def test_fixed():
    model = conv_net()
    controller = FixedController(
        model,
        {
            "0": torch.tensor([5, 1]),
            "1": [True, False, True, False, False, False],
            "3": torch.zeros(8, dtype=torch.bool),
            "4": [],
        },
    )
    expected = {
        "0": [False, True, False, False, False, True],
        "1": [True, False, True, False, False, False],
        "3": [False] * 8,
        "4": [False] * 8,
        "9": [True] * 5,
    }
    assert masks(model) == expected
    model[0].channels.reset()
    controller.step()
    assert masks(model) == expected
    assert controller.history[0]["layers"]["0"] == {"active": 2, "total": 6}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"9": [0], "fc": [1]}, ValueError, r"masks: expected names among .*got \['fc'\]"),
        ({"9": [0], "3": [True] * 7}, ValueError, r"masks\['3'\]: mask: expected length 8, got 7"),
        ({"9": [0], "3": [8]}, ValueError, r"masks\['3'\]: indices: expected 0 <= index < 8"),
        ({"9": [0], "3": [-1]}, ValueError, r"masks\['3'\]: indices"),
        ({"9": [0], "3": [1, 1]}, ValueError, r"masks\['3'\]: .*duplicates"),
        ({"9": [0], "3": torch.ones(8)}, TypeError, r"masks\['3'\]: .*got torch.float32"),
        ({"9": [0], "3": [[True] * 8]}, ValueError, r"masks\['3'\]: .*one dimension"),
        ({name: [] for name in "01349"}, ValueError, "at least one active neuron"),
        ([[True]], TypeError, "masks: expected a mapping"),
    ],
)
def test_fixed_refuses(wrong, error, message):
    model = conv_net()
    before = picture(model)
    with pytest.raises(error, match=message):
        FixedController(model, wrong)
    assert picture(model) == before


MAKERS = {
    "neq": lambda model: NEqController(model, images()),
    "stochastic": lambda model: StochasticController(model, 0.5),
    "fixed": lambda model: FixedController(model, {}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_model_that_is_not_converted(make):
    with pytest.raises(ValueError, match=r"call neq.convert\(model\) first"):
        make(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        make({})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1e-9}, ValueError, "eps: expected a finite number, at least 0, got -1e-09"),
        ({"eps": math.inf}, ValueError, "eps: .*got inf"),
        ({"eps": math.nan}, ValueError, "eps: .*got nan"),
        ({"eps": "1e-3"}, TypeError, "eps: expected a number, got str"),
        ({"mu": 1.5}, ValueError, "mu: expected a finite number, at least 0 and at most 1"),
        ({"mu": -0.1}, ValueError, "mu: "),
        ({"mu": None}, TypeError, "mu: "),
        ({"warmup": -1}, ValueError, "warmup: expected at least 0, got -1"),
        ({"warmup": 1.0}, TypeError, "warmup: expected an int, got float"),
        ({"warmup": True}, TypeError, "warmup: "),
        ({"velocity": "slides"}, ValueError, r"velocity: expected one of \['slide', 'reference'\]"),
        ({"similarity": "cosine"}, ValueError, r"similarity: expected one of \['neuron', 'sample'"),
        ({"memory": "disk"}, ValueError, r"memory: expected one of \['snapshot', 'activations'\]"),
        ({"memory": ["snapshot"]}, ValueError, "memory: expected one of"),
    ],
)
def test_neq_refuses(options, error, message):
    model = conv_net()
    before = picture(model)
    with pytest.raises(error, match=message):
        NEqController(model, images(), **options)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("p", "options", "error", "message"),
    [
        (1.1, {}, ValueError, "p: expected a finite number, at least 0 and at most 1, got 1.1"),
        (-0.1, {}, ValueError, "p: "),
        (math.nan, {}, ValueError, "p: "),
        ("half", {}, TypeError, "p: expected a number"),
        (0.5, {"warmup": -1}, ValueError, "warmup: "),
        (0.5, {"seed": -1}, ValueError, "seed: "),
        (0.5, {"seed": "x"}, TypeError, "seed: "),
    ],
)
def test_stochastic_refuses(p, options, error, message):
    with pytest.raises(error, match=message):
        StochasticController(conv_net(), p, **options)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_history(make):
    model = conv_net()
    controller = make(model)
    assert controller.history == []
    for epoch in range(3):
        train(model, images())
        controller.step()
        assert controller.epoch == epoch + 1
    assert json.loads(json.dumps(controller.history, allow_nan=False)) == controller.history
    assert [entry["epoch"] for entry in controller.history] == [0, 1, 2]
    assert all(entry["seconds"] > 0 for entry in controller.history)
    for entry in controller.history:
        totals = {name: layer["total"] for name, layer in entry["layers"].items()}
        assert totals == {"0": 6, "1": 6, "3": 8, "4": 8, "9": 5}
    last = {name: layer["active"] for name, layer in controller.history[-1]["layers"].items()}
    assert last == {name: sum(mask) for name, mask in masks(model).items()}


def test_history_carries_phi_and_velocity():
    model = conv_net()
    controller = NEqController(model, images())
    wiggle(model)
    controller.step()
    entry = controller.history[0]["layers"]["3"]
    response = controller.response
    assert entry["phi_mean"] == response.phi["3"].mean().item()
    assert entry["velocity_abs_mean"] == response.velocity["3"].abs().mean().item()


def test_a_diverged_model_stays_active_and_recovers():
    model = conv_net()
    controller = NEqController(model, images(), mu=0.5)
    good = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    controller.step()
    assert bool((controller.response.phi["0"] == 0).all())
    assert all(all(mask) for mask in masks(model).values())
    json.dumps(controller.history, allow_nan=False)
    with torch.no_grad():
        model[0].weight.copy_(good)
    for _ in range(20):
        controller.step()
    assert not any(masks(model)["3"])


def test_masks_that_do_not_change_keep_their_generation():
    model = conv_net()
    controller = NEqController(model, images(), eps=0)
    controller.step()
    before = picture(model)["generations"]
    controller.step()
    assert picture(model)["generations"] == before


def test_data_parallel_wrappers_are_seen_through():
    model = conv_net()
    wrapped = nn.DataParallel(model)
    controller = NEqController(wrapped, images(), eps=10)
    wiggle(model)
    controller.step()
    assert sorted(controller.history[0]["layers"]) == ["0", "1", "3", "4", "9"]
    assert not any(masks(model)["0"])


def test_steps_between_forward_and_backward_are_noticed():
    """The masks change through ActiveChannels, which training checks."""
    model = conv_net()
    controller = FixedController(model, {"0": [1]})
    loss = model(images()[0]).sum()
    controller._masks["0"] = torch.tensor([True, False, False, False, False, False])
    controller.step()
    with pytest.raises(RuntimeError, match="generation"):
        loss.backward()
