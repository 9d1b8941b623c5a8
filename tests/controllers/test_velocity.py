"""The worked example of the design, in the formulas and through a real controller."""

import pytest
import torch

import neq_kernels as neq
from neq_kernels.controllers import NEqController
from neq_kernels.controllers.velocity import VELOCITIES
from tests.support.nets import Rotating, masks

PHI = (0.90, 0.95, 0.97, 0.975, 0.976)
DELTA = (-0.10, 0.05, 0.02, 0.005, 0.001)
VELOCITY = {
    "slide": (-0.10, 0.10, -0.03, 0.02, -0.009),
    "reference": (-0.10, 0.10, 0.02, -0.005, -0.0065),
}


@pytest.mark.parametrize("name", VELOCITY)
def test_formula(name):
    velocity = last = torch.zeros((), dtype=torch.float64)
    for delta, expected in zip(DELTA, VELOCITY[name], strict=True):
        delta = torch.tensor(delta, dtype=torch.float64)
        velocity, last = VELOCITIES[name](0.5, velocity, delta, last), delta
        assert velocity.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("similarity", ["neuron", "sample"])
def test_one_and_zero_are_the_only_similarities_of_single_values(similarity):
    """A flat output has one value per sample, so "sample" sees signs where "neuron" sees angles."""
    model = Rotating(1)
    controller = NEqController(model, model.probe, similarity=similarity)
    model.turn([0.5])
    controller.step()
    # (1, 0) turned by 60 degrees is (.5, .87): first sample same sign, second zero against .87.
    assert controller.response.phi["hidden"].item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
@pytest.mark.parametrize("name", VELOCITY)
@pytest.mark.filterwarnings("ignore:frozen neurons moved:UserWarning")
def test_through_the_controller(name, memory):
    """Neuron 0 is the worked example, neuron 1 never moves, neuron 2 runs it one epoch late."""
    model = Rotating(3)
    controller = NEqController(model, model.probe, eps=0.01, mu=0.5, velocity=name, memory=memory)
    late = (1.0, *PHI)
    frozen = []
    for t, phi in enumerate(PHI):
        model.turn([phi, 1.0, late[t]])
        controller.step()
        response = controller.response
        assert response.phi["hidden"].tolist() == pytest.approx([phi, 1.0, late[t]], abs=1e-12)
        assert response.delta_phi["hidden"][0].item() == pytest.approx(DELTA[t], abs=1e-12)
        v = [VELOCITY[name][t], 0.0, VELOCITY[name][t - 1] if t else 0.0]
        assert response.velocity["hidden"].tolist() == pytest.approx(v, abs=1e-12)
        frozen.append([not active for active in masks(model)["hidden"]])
    slow = [abs(v) <= 0.01 for v in VELOCITY[name]]
    assert frozen == [[slow[t], True, slow[t - 1] if t else True] for t in range(len(PHI))]
    assert masks(model)["head"] == [True]


def test_after_the_first_epoch_only_unchanged_neurons_freeze():
    model = Rotating(3)
    controller = NEqController(model, model.probe, eps=0.0)
    model.turn([1.0, 0.999999, 0.5])
    controller.step()
    assert masks(model)["hidden"] == [False, True, True]


@pytest.mark.filterwarnings("ignore:frozen neurons moved:UserWarning")
def test_a_frozen_neuron_comes_back():
    model = Rotating(2)
    controller = NEqController(model, model.probe, eps=1e-3)
    seen = []
    for phi in (1.0, 1.0, 0.9, 0.9, 0.9):
        model.turn([phi, 0.5])
        controller.step()
        seen.append(masks(model)["hidden"][0])
    # v = 0, 0, -.1, .05, -.025
    assert seen == [False, False, True, True, True]


@pytest.mark.parametrize("warmup", [0, 1, 2, 4])
def test_warmup_counts_epochs_that_train_everything(warmup):
    model = Rotating(2)
    controller = NEqController(model, model.probe, warmup=warmup)
    assert all(masks(model)["hidden"])
    for epoch_that_comes in range(1, 6):
        controller.step()
        assert any(masks(model)["hidden"]) == (epoch_that_comes < warmup)


def test_names_are_public():
    assert neq.NEqController is NEqController
