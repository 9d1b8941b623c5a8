"""An attach that was forgotten, and layers that do not learn."""

import copy
import warnings

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.controllers import FixedController, NEqController, StochasticController
from tests.support.nets import conv_net, images, masks

UNATTACHED = "no optimizer is attached to the model of this controller"
CONTROLLERS = {
    "snapshot": lambda model: NEqController(model, images(), eps=1e-2),
    "activations": lambda model: NEqController(model, images(), eps=1e-2, memory="activations"),
    "stochastic": lambda model: StochasticController(model, 0.5, warmup=0),
    "fixed": lambda model: FixedController(model, {"0": [1], "3": []}),
}
every_controller = pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def epoch(model, optimizer):
    for x in images(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@every_controller
def test_a_forgotten_attach_is_found(make):
    model = conv_net()
    optimizer = sgd(model)
    controller = make(model)
    found = []
    for _ in range(4):
        epoch(model, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            controller.step()
        found += [str(w.message) for w in caught]
        assert all(w.filename == __file__ for w in caught)
    assert len([m for m in found if m.startswith(UNATTACHED)]) == 1
    (moved,) = [m for m in found if m.startswith("frozen neurons moved")]
    assert any(f"those of '{name}'" in moved for name in masks(model))
    assert "neq.attach(optimizer, model)" in moved


@every_controller
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_warning_once_attached(make, dtype):
    model = conv_net()
    optimizer = sgd(model)
    neq.attach(optimizer, model)
    controller = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            epoch(model, optimizer)
            controller.step()
        model.to(dtype).float()
        model[0].channels.set([2])
        epoch(model, optimizer)
        controller.step()
        state = controller.state_dict()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        controller.load_state_dict(state)
        epoch(model, optimizer)
        controller.step()


def test_masks_by_hand_are_watched_too():
    model = conv_net()
    model[9].channels.set([0])
    controller = StochasticController(model, 0.0)
    epoch(model, sgd(model))
    with pytest.warns(UserWarning, match="frozen neurons moved since the last step, those of '9'"):
        controller.step()


def test_a_copy_is_trained():
    model = conv_net()
    optimizer = sgd(model)
    handle = neq.attach(optimizer, model)
    trained = copy.deepcopy(model)
    assert model[0].anchor.optimizers
    assert not trained[0].anchor.optimizers
    controller = StochasticController(trained, 0.5)
    controller.step()
    with pytest.warns(UserWarning, match=UNATTACHED):
        controller.step()
    handle.remove()
    assert not model[0].anchor.optimizers


class Adapted(nn.Module):
    """A layer held, and two of low rank beside it that learn: LoRA."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(8, 3).requires_grad_(False)
        neq.convert(self)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))


PROBE = [torch.randn(5, 6, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_what_does_not_learn_is_not_watched(memory):
    model = Adapted()
    model.base.channels.set([1])
    observed = []
    controller = NEqController(model, PROBE, eps=9, memory=memory)
    assert controller.outputs == ["head"]
    model.base.register_forward_pre_hook(
        lambda layer, _: observed.append(len(layer._forward_hooks))
    )
    controller.step()
    assert set(observed) == {0}
    assert controller.response.measured == {"down", "up"}
    assert controller.history[0]["layers"].keys() == {"down", "up"}
    found = masks(model)
    assert found["base"] == [False, True] + [False] * 6
    assert all(found["head"])
    assert sum(found["down"]) + sum(found["up"]) == 1
    # Thawed, a layer is watched from the next step on.
    model.base.requires_grad_(True)
    if memory == "activations":
        with pytest.warns(UserWarning, match=r"stay active: \['base'\]"):
            controller.step()
    for _ in range(2):
        controller.step()
    assert "base" in controller.response.measured
    assert not any(masks(model)["base"])


def test_random_masks_leave_what_does_not_learn():
    model = Adapted()
    controller = StochasticController(model, 1.0, warmup=0, include_output=True)
    found = masks(model)
    assert all(found["base"])
    assert all(found["head"])
    assert sum(found["down"]) + sum(found["up"]) == 1
    controller.step()
    assert controller.history[0]["layers"].keys() == {"down", "up"}


def test_fixed_masks_that_leave_the_loss_without_a_graph_are_refused():
    model = Adapted()
    with pytest.raises(ValueError, match="active neuron in the layers that learn, got none"):
        FixedController(model, {"down": [], "up": []})
    assert all(all(mask) for mask in masks(model).values())
    FixedController(model, {"down": [], "up": [1], "base": [0]})
    assert sum(masks(model)["base"]) == 1
