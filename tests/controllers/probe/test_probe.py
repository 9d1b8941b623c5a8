"""Which probes are taken, which are refused, and that the model is left as it was found."""

import random
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq_kernels as neq
from neq_kernels.controllers import NEqController, StochasticController
from tests.support.nets import assert_same, conv_net, images, masks, picture, train, wiggle

MEMORIES = ["snapshot", "activations"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale=None):
        x = torch.tanh(self.first(x))
        return self.head(x if scale is None else x * scale)


def phi_after_wiggle(batches, **options):
    torch.manual_seed(3)
    model = neq.convert(TwoInputs())
    controller = NEqController(model, batches, **options)
    wiggle(model)
    controller.step()
    return controller.response.phi["head"].tolist()


Pair = namedtuple("Pair", "x y")


class InPlaceFirst(TwoInputs):
    def forward(self, x):
        return super().forward(x.sub_(1).mul_(3))


@dataclass
class Custom:
    x: torch.Tensor

    def to(self, device):
        return Custom(self.x.to(device))


def test_kinds_of_batches():
    x, scale = torch.randn(5, 3), torch.rand(5, 1)
    plain = phi_after_wiggle([x])
    assert phi_after_wiggle([(x, torch.arange(5))]) == plain
    assert phi_after_wiggle([[x, "label"]]) == plain
    assert phi_after_wiggle([Pair(x, 1)]) == plain
    assert phi_after_wiggle([{"x": x}]) == plain
    assert phi_after_wiggle(DataLoader(TensorDataset(x, x), batch_size=5)) == plain
    assert phi_after_wiggle([Custom(x)], forward=lambda m, b: m(b.x)) == plain
    assert phi_after_wiggle([{"a": [x]}], forward=lambda m, b: m(b["a"][0])) == plain
    assert phi_after_wiggle([Pair(x, x)], forward=lambda m, b: m(b.y)) == plain
    assert phi_after_wiggle([x[:2], x[2:]]) == pytest.approx(plain, abs=1e-6)
    scaled = phi_after_wiggle([{"x": x, "scale": scale}])
    assert scaled != plain
    assert phi_after_wiggle([(x, scale)], forward=lambda m, b: m(*b)) == scaled


def test_the_first_element_is_all_that_counts_without_forward():
    labels = [0]

    class Relabelled:
        def __iter__(self):
            labels[0] += 1
            return iter([(torch.ones(2, 3), torch.tensor(labels))])

    phi_after_wiggle(Relabelled())
    with pytest.raises(ValueError, match="not the one of the last pass"):
        phi_after_wiggle(Relabelled(), forward=lambda m, b: m(b[0]))


@pytest.mark.parametrize("batch", ["text", 3, [], [["x"]], ({"x": 1},), Custom(torch.ones(2, 3))])
def test_other_kinds_name_forward(batch):
    with pytest.raises(ValueError, match=r"forward=lambda model, batch"):
        NEqController(neq.convert(TwoInputs()), [batch])


def test_things_that_are_no_probe():
    model = neq.convert(TwoInputs())
    for wrong in (torch.ones(4, 3), np.ones((4, 3)), {"x": torch.ones(4, 3)}, "probe", 3, None):
        with pytest.raises(TypeError, match="probe: expected an iterable of batches"):
            NEqController(model, wrong)
    with pytest.raises(ValueError, match="one-shot generator"):
        NEqController(model, (x for x in [torch.ones(4, 3)]))
    with pytest.raises(TypeError, match="forward: expected a callable"):
        NEqController(model, [torch.ones(4, 3)], forward="model")


@pytest.mark.parametrize("memory", MEMORIES)
def test_empty_probe(memory):
    model = neq.convert(TwoInputs())
    for batches in ([], [torch.ones(0, 3)], [{"x": torch.ones(0, 3)}] * 2):
        with pytest.raises(ValueError, match="at least one batch that is not empty"):
            NEqController(model, batches, memory=memory)
        with pytest.raises(ValueError, match="at least one batch that is not empty"):
            StochasticController(model, 0.5, probe=batches)


@pytest.mark.parametrize("similarity", ["neuron", "sample"])
def test_an_empty_batch_changes_nothing(similarity):
    x = torch.randn(5, 3)
    plain = phi_after_wiggle([x], similarity=similarity)
    assert phi_after_wiggle([x[:0], x, x[:0]], similarity=similarity) == plain


def tampered(kind):
    a, b, c = images(3)
    one_pixel = b.clone()
    one_pixel[0, 0, 0, 0] += 1e-3
    return {
        "shorter": ([a, b], r"expected 3 batches as in the last pass, got 2"),
        "gone": ([], r"expected 3 batches as in the last pass, got 0"),
        "longer": ([a, b, c, a], r"expected 3 batches as in the last pass, got more"),
        "order": ([a, c, b], r"batch 1 is not the one.*float32\[4, 3, 6, 6\].*same order"),
        "contents": ([a, one_pixel, c], r"batch 1 is not the one"),
        "size": ([a, b[:3], c], r"batch 1 .*expected 'float32\[4, .*got 'float32\[3,"),
        "dtype": ([a.double(), b, c], r"batch 0 .*got 'float64\["),
        "shape": ([a.reshape(4, 3, 36, 1), b, c], r"batch 0 .*got 'float32\[4, 3, 36, 1\]"),
    }[kind]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "kind", ["shorter", "gone", "longer", "order", "contents", "size", "dtype", "shape"]
)
def test_another_probe_is_refused_and_nothing_is_lost(kind, memory):
    model, probe = conv_net(), images(3)
    controller = NEqController(model, probe, memory=memory, eps=0.02)
    train(model, images())
    controller.step()
    train(model, images())
    before, state = picture(model), controller.state_dict()
    original = list(probe)
    probe[:], message = tampered(kind)
    with pytest.raises(ValueError, match=message):
        controller.step()
    assert picture(model) == before
    assert_same(controller.state_dict(), state)
    probe[:] = original
    controller.step()
    assert len(controller.history) == 2


def test_a_shuffling_loader_is_refused_at_the_first_step():
    model = conv_net()
    data = TensorDataset(torch.cat(images()))
    controller = NEqController(model, DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(ValueError, match="shuffling"):
        controller.step()


def test_a_loader_with_workers():
    data = TensorDataset(torch.cat(images()))
    model = conv_net()
    loader = DataLoader(data, batch_size=5, num_workers=1, multiprocessing_context="fork")
    controller = NEqController(model, loader)
    wiggle(model)
    before = picture(model)
    controller.step()
    assert {**picture(model), "masks": 0, "generations": 0} == {
        **before,
        "masks": 0,
        "generations": 0,
    }


class Restless(nn.Module):
    """Draws, writes buffers and counts in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.tensor(0))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        self.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
        self.calls = self.calls + 1
        x = x + torch.rand(()) + random.random() + np.random.rand()
        return self.head(nn.functional.dropout(x, 0.3, training=True).mean((2, 3)))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("make", [conv_net, lambda: neq.convert(Restless())])
def test_the_model_is_left_as_found(make, memory):
    model = make()
    model.register_forward_hook(lambda *_: None)
    train(model, images())
    model.train()
    list(model.children())[1].eval()
    next(model.parameters()).requires_grad_(False)
    before = picture(model)
    assert any(g is not None for g in before["gradients"].values())
    controller = NEqController(model, images(seed=9), memory=memory)
    StochasticController(model, 0.5, probe=images(seed=9))
    assert picture(model) == before
    controller.step()
    changed = {"masks", "generations"}
    after = picture(model)
    for key in before.keys() - changed:
        assert after[key] == before[key], key


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_that_is_random_in_evaluation_mode_compares_with_itself(memory):
    model = neq.convert(Restless())
    controller = NEqController(model, images(), memory=memory)
    torch.rand(3), random.random(), np.random.rand()
    controller.step()
    assert all(bool((phi == 1).all()) for phi in controller.response.phi.values())


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_that_writes_its_input_finds_the_probe_as_it_was(memory):
    model, x = neq.convert(InPlaceFirst()), torch.randn(5, 3)
    probe = [(x.clone(), 1)]
    controller = NEqController(model, probe, memory=memory)
    controller.step()
    assert all(bool((phi == 1).all()) for phi in controller.response.phi.values())
    assert torch.equal(probe[0][0], x)


class Failing(nn.Module):
    """Raises in its second layer when told to."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.countdown = None

    def forward(self, x):
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                self.net[0](x)
                raise KeyError("planted")
        return self.net(x)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("countdown", [0, 1, 2])
def test_an_exception_in_the_model_loses_nothing(countdown, memory):
    model = Failing()
    controller = NEqController(model, images(), memory=memory, eps=0.02)
    train(model, images())
    controller.step()
    train(model, images())
    model.train()
    before, state = picture(model), controller.state_dict()
    model.countdown = countdown
    with pytest.raises(KeyError, match="planted"):
        controller.step()
    model.countdown = None
    assert picture(model) == before
    assert_same(controller.state_dict(), state)


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_exception_while_masks_are_set_loses_nothing(memory, monkeypatch):
    model = conv_net()
    controller = NEqController(model, images(), memory=memory, eps=0.02)
    train(model, images())
    controller.step()
    train(model, images())
    before, state = masks(model), controller.state_dict()
    monkeypatch.setattr(controller._memory, "commit", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        controller.step()
    assert masks(model) == before
    assert_same(controller.state_dict(), state)
    monkeypatch.undo()
    controller.step()
    assert masks(model) != before


def test_the_constructor_cleans_up_too():
    model = Failing()
    model.countdown = 1
    model.train()
    before = picture(model)
    with pytest.raises(KeyError, match="planted"):
        NEqController(model, images())
    model.countdown = None
    assert {**picture(model), "attributes": 0} == {**before, "attributes": 0}
