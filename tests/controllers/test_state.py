"""Resuming: bit-equal, through a file, and never half-loaded."""

import io

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.controllers import FixedController, NEqController, StochasticController
from tests.support.nets import (
    Block,
    assert_same,
    conv_net,
    images,
    masks,
    picture,
    tokens,
    train,
    wiggle,
)

MAKERS = {
    "snapshot": lambda model: NEqController(model, images(seed=9), eps=3e-4, warmup=2),
    "activations": lambda model: NEqController(
        model, images(seed=9), eps=3e-4, memory="activations", velocity="reference"
    ),
    "sample": lambda model: NEqController(model, images(seed=9), eps=3e-4, similarity="sample"),
    "stochastic": lambda model: StochasticController(model, 0.5, seed=4),
    "fixed": lambda model: FixedController(model, {"0": [1, 3], "3": [0]}),
}


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(model, controller, epochs):
    seen = []
    for epoch in epochs:
        train(model, images(), seed=epoch)
        controller.step()
        seen.append((masks(model), {n: t.clone() for n, t in model.state_dict().items()}))
    return seen


def without_seconds(state):
    return {
        **state,
        "history": [{k: v for k, v in e.items() if k != "seconds"} for e in state["history"]],
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_is_the_same_run(kind):
    torch.manual_seed(0)
    model = conv_net()
    controller = MAKERS[kind](model)
    run(model, controller, range(3))
    checkpoint = through_a_file(
        {"model": model.state_dict(), "controller": controller.state_dict()}
    )
    straight = run(model, controller, range(3, 6))
    assert len({str(m) for m, _ in straight}) > 1 or kind == "fixed"

    torch.manual_seed(1)
    again = conv_net()
    resumed = MAKERS[kind](again)
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["controller"])
    assert masks(again) == {n: m.tolist() for n, m in checkpoint["controller"]["masks"].items()}
    assert resumed.epoch == 3
    assert resumed.history == checkpoint["controller"]["history"]
    for (found_masks, found), (expected_masks, expected) in zip(
        run(again, resumed, range(3, 6)), straight, strict=True
    ):
        assert found_masks == expected_masks
        assert_same(found, expected)
    assert_same(without_seconds(resumed.state_dict()), without_seconds(controller.state_dict()))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_is_a_copy(kind):
    model = conv_net()
    controller = MAKERS[kind](model)
    run(model, controller, range(2))
    state = controller.state_dict()
    kept = through_a_file(state)
    run(model, controller, range(2, 4))
    assert_same(state, kept)
    controller.load_state_dict(state)
    run(model, controller, range(2, 4))
    assert_same(state, kept)


def broken(state, kind):
    """A state with one fault, and what the error must say."""
    masks_ = state["masks"]
    if kind == "renamed layer":
        masks_["7"] = masks_.pop("3")
        return r"masks: missing layers \['3'\]; masks: unknown layers \['7'\]"
    if kind == "no layer":
        masks_.clear()
        return r"masks: missing layers \['0', '1', '3', '4', '9'\]"
    if kind == "unknown layer":
        masks_["7"] = masks_["3"]
        return r"masks: unknown layers \['7'\]"
    if kind == "mask length":
        masks_["3"] = masks_["3"][:-1]
        return r"masks: 3 expected torch.bool \(8,\), got torch.bool \(7,\)"
    if kind == "mask dtype":
        masks_["3"] = masks_["3"].float()
        return r"masks: 3 expected torch.bool \(8,\), got torch.float32"
    if kind == "no masks":
        del state["masks"]
        return "masks: expected a dict of tensors, got NoneType"
    if kind == "epoch":
        state["epoch"] = "3"
        return "epoch: expected an int, at least 0, got '3'"
    if kind == "history":
        state["history"] = {}
        return "history: expected a list of dicts, got dict"
    if kind == "controller":
        state["controller"] = "OtherController"
        return "got 'OtherController', format 1"
    state["format"] = 99
    return "format 99"


@pytest.mark.parametrize("controller_kind", ["snapshot", "stochastic", "fixed"])
@pytest.mark.parametrize(
    "fault",
    [
        "renamed layer",
        "no layer",
        "unknown layer",
        "mask length",
        "mask dtype",
        "no masks",
        "epoch",
        "history",
        "controller",
        "format",
    ],
)
def test_a_broken_state_is_refused_whole(controller_kind, fault):
    check_refused(controller_kind, lambda state: broken(state, fault))


def break_neq(state, fault):
    if fault == "no phi":
        del state["phi"]["3"]
        return r"phi: missing layers \['3'\]"
    if fault == "phi":
        state["phi"]["3"] = torch.zeros(3, dtype=torch.float64)
        return r"phi: 3 expected torch.float64 \(8,\), got torch.float64 \(3,\)"
    if fault == "velocity dtype":
        state["velocity"]["3"] = state["velocity"]["3"].float()
        return "velocity: 3 expected torch.float64"
    if fault == "no delta":
        del state["delta_phi"]
        return "delta_phi: expected a dict of tensors"
    if fault == "settings":
        state["settings"]["velocity"] = "reference"
        return "settings: expected .*'slide'.*got .*'reference'"
    if fault == "measured":
        state["measured"] = ["3", "nowhere"]
        return "measured: expected a list of layer names"
    if fault == "probe":
        state["probe"][0][1] = "float32[1] #0"
        return "probe: expected batches"
    if fault == "no probe":
        state["probe"] = None
        return "probe: expected fingerprints"
    if fault == "memory name":
        state["memory"]["10.weight"] = state["memory"].pop("9.weight")
        return r"memory: missing \['9.weight'\]; memory: unknown \['10.weight'\]"
    if fault == "memory shape":
        state["memory"]["9.weight"] = torch.zeros(5, 9)
        return r"memory: 9.weight expected shape \(5, 8\), got \(5, 9\)"
    if fault == "memory value":
        state["memory"]["9.weight"] = 3
        return "memory: 9.weight is a int, not a tensor"
    state["memory"] = []
    return "memory: expected a dict of tensors, got list"


@pytest.mark.parametrize(
    "fault",
    [
        "no phi",
        "phi",
        "velocity dtype",
        "no delta",
        "settings",
        "measured",
        "probe",
        "no probe",
        "memory name",
        "memory shape",
        "memory value",
        "memory type",
    ],
)
def test_a_broken_neq_state_is_refused_whole(fault):
    check_refused("snapshot", lambda state: break_neq(state, fault))


def break_activations(state, fault):
    if fault == "type":
        state["memory"] = {}
        return "memory: expected for each batch a dict of lists of tensors"
    if fault == "entry":
        state["memory"][1]["3"] = 7
        return "memory: expected for each batch a dict of lists of tensors"
    if fault == "batches":
        state["memory"].pop()
        return "memory: expected 3 batches, got 2"
    if fault == "calls":
        state["memory"][1]["3"].pop()
        return r"memory, batch 1: missing \['3 call 0'\]"
    state["memory"][1]["3"][0] = torch.zeros(1)
    return r"memory, batch 1: 3 call 0 expected shape \(4, 8, 4, 4\), got \(1,\)"


@pytest.mark.parametrize("fault", ["type", "entry", "batches", "calls", "shape"])
def test_broken_activations_are_refused_whole(fault):
    check_refused("activations", lambda state: break_activations(state, fault))


def test_a_broken_generator_is_refused_whole():
    def without(state):
        del state["generator"]
        return "generator: no generator state"

    def cut(state):
        state["generator"] = state["generator"][:10]
        return "generator: no generator state"

    check_refused("stochastic", without)
    check_refused("stochastic", cut)


def check_refused(kind, spoil):
    model = conv_net()
    controller = MAKERS[kind](model)
    run(model, controller, range(2))
    state = controller.state_dict()
    message = spoil(state)
    run(model, controller, range(2, 3))
    before, own = picture(model), controller.state_dict()
    with pytest.raises(ValueError, match=f"state: does not fit this controller: .*{message}"):
        controller.load_state_dict(state)
    assert picture(model) == before
    assert_same(controller.state_dict(), own)


@pytest.mark.filterwarnings("ignore:frozen neurons moved:UserWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_from_before_a_layer_had_neurons(kind):
    """0.1.0 had none for embeddings, for instance: they stay active, and nothing else changes."""
    torch.manual_seed(0)
    model = conv_net()
    controller = MAKERS[kind](model)
    run(model, controller, range(3))
    state = controller.state_dict()
    for key in ("masks", "phi", "delta_phi", "velocity"):
        state.get(key, {}).pop("3", None)
    if kind != "stochastic" and kind != "fixed":
        state["measured"].remove("3")
    if kind == "activations":
        for batch in state["memory"]:
            del batch["3"]
    again = conv_net()
    again.load_state_dict(model.state_dict())
    resumed = MAKERS[kind](again)
    with pytest.warns(UserWarning, match=r"nothing of these layers.* stay active: \['3'\]"):
        resumed.load_state_dict(state)
    expected = masks(model)
    assert masks(again) == {**expected, "3": [True] * len(expected["3"])}
    for net, its in ((model, controller), (again, resumed)):
        wiggle(net)
        its.step()
    if "phi" in state:
        (phi, known), others = (c.response.phi for c in (resumed, controller)), ["0", "1", "4", "9"]
        assert all(torch.equal(phi[name], known[name]) for name in others)
        assert bool((phi["3"] == 1).all()) is (kind == "activations")
    elif kind == "stochastic":
        assert masks(again) == masks(model)


def test_states_of_other_controllers_and_models():
    model = conv_net()
    neq_controller, stochastic = MAKERS["snapshot"](model), MAKERS["stochastic"](model)
    with pytest.raises(ValueError, match="expected the state of a StochasticController"):
        stochastic.load_state_dict(neq_controller.state_dict())
    other = NEqController(neq.convert(Block()), tokens())
    with pytest.raises(ValueError, match=r"masks: missing layers \['0', '1', '3', '4', '9'\]"):
        neq_controller.load_state_dict(other.state_dict())
    with pytest.raises(TypeError, match="state: expected a mapping, got NoneType"):
        neq_controller.load_state_dict(None)


def test_the_state_of_a_wrapped_model_fits_the_plain_one():
    model = conv_net()
    wrapped = NEqController(nn.DataParallel(torch.compile(model, backend="eager")), images())
    wrapped.step()
    other = NEqController(conv_net(), images())
    other.load_state_dict(wrapped.state_dict())
    assert masks(other._model) == masks(model)


def test_another_probe_is_refused_on_load():
    state = NEqController(conv_net(), images()).state_dict()
    for memory in ("snapshot", "activations"):
        state = NEqController(conv_net(), images(), memory=memory).state_dict()
        other = NEqController(conv_net(), images(seed=11), memory=memory)
        with pytest.raises(ValueError, match="probe: expected batches"):
            other.load_state_dict(state)
