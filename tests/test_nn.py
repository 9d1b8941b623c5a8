"""neq.nn: constructed layers are converted layers, and behave as torch.nn's to everybody else."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, skip_init

import neq_kernels as neq
from neq_kernels.conversion.neuron_classes import NEURON_CLASSES
from neq_kernels.layers import conv, linear, norm
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.constructed import (
    LAYERS,
    assert_same,
    constructed,
    every_layer,
    image,
    net,
    picture,
    set_masks,
    step,
    stock,
)

# --- the names -----------------------------------------------------------------------------------


def test_every_layer_type_that_convert_knows_has_its_name():
    known = {kind.__name__: kind for kind in NEURON_CLASSES.values()}
    del known["MultiheadAttention"]  # its output projection is a layer that convert converts
    assert {name: getattr(neq.nn, name) for name in neq.nn.__all__} == known
    assert sorted([*LAYERS, "Bilinear"]) == list(neq.nn.__all__)
    assert neq.nn.Linear is linear.Linear
    assert neq.nn.Conv2d is conv.Conv2d
    assert neq.nn.LayerNorm is norm.LayerNorm


@every_layer
def test_the_signature_is_torchs(name):
    ours, torchs = getattr(neq.nn, name), getattr(nn, name)
    assert inspect.signature(ours) == inspect.signature(torchs)
    assert issubclass(ours, torchs)


# --- constructing --------------------------------------------------------------------------------


@every_layer
def test_it_is_what_convert_makes(name):
    ours, converted = constructed(name), neq.convert(stock(name))
    assert isinstance(ours, getattr(nn, name))
    assert type(ours) is type(converted)
    assert vars(ours).keys() == vars(converted).keys()
    assert repr(ours) == repr(converted)
    assert (ours.grad_input, ours.specialized) == ("exact", False)
    assert (converted.grad_input, converted.specialized) == ("exact", False)
    assert len(ours.channels) == ours.channels.n_active == 6
    assert_same(ours.state_dict().values(), converted.state_dict().values())
    for layer in (ours, converted):
        layer.channels.set([0, 2, 5])
    assert_same(step(ours, image(name)), step(converted, image(name)))
    for parameter, layout in ours.neuron_parameters():
        frozen = layout.gather(parameter.grad, ours.channels.frozen)
        assert len(frozen) == 3
        assert bool((frozen == 0).all())


@every_layer
def test_nothing_is_shared_between_layers(name):
    first, second = constructed(name), constructed(name)
    assert first.anchor is not second.anchor
    first.channels.set([1])
    assert second.channels.n_active == 6


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(name, dtype):
    layer = constructed(name, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    layer.channels.set([0, 3])
    expected = neq.convert(stock(name, dtype=dtype))
    expected.channels.set([0, 3])
    assert_same(step(layer, image(name, dtype)), step(expected, image(name, dtype)))


def on_meta(name):
    with torch.device("meta"):
        return constructed(name)


def skipped(name):
    arguments, keywords, _ = LAYERS[name]
    layer = skip_init(getattr(neq.nn, name), *arguments, **keywords)
    return layer.to("meta")


@every_layer
@pytest.mark.parametrize("make", [lambda n: constructed(n, device="meta"), on_meta, skipped])
def test_the_meta_device(name, make):
    layer = make(name)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    out = layer(image(name).to("meta"))
    out.sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())
    layer.channels.set([2, 4])
    layer.to_empty(device="cpu")
    layer.load_state_dict(stock(name).state_dict())
    expected = constructed(name)
    expected.channels.set([2, 4])
    assert_same(step(layer, image(name)), step(expected, image(name)))


@every_layer
def test_moves_leave_channels_alone(name):
    layer = constructed(name)
    layer.channels.set([1, 4])
    channels, generation = layer.channels, layer.channels.generation
    layer.half().to(torch.bfloat16).double()
    assert layer.channels is channels
    assert channels.generation == generation
    expected = constructed(name).to(torch.float16).to(torch.bfloat16).to(torch.float64)
    expected.channels.set([1, 4])
    x = image(name, torch.float64)
    assert_same(step(layer, x), step(expected, x))


class OfTheUser(neq.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width, bias=False)
        self.scale = 2.0

    def forward(self, input):
        return super().forward(input) * self.scale


def test_a_subclass_of_the_user():
    layer = OfTheUser(4)
    assert list(inspect.signature(OfTheUser).parameters) == ["width"]
    assert len(layer.channels) == 4
    model = neq.convert(nn.Sequential(layer, nn.Linear(4, 2)), grad_input="active")
    assert type(layer) is OfTheUser
    assert layer.anchor is model[1].anchor
    assert layer.grad_input == "active"


# --- bad input -----------------------------------------------------------------------------------


def outcome_of(call, kind):
    """The error, or the layer that some types do construct."""
    try:
        return repr(call(kind)).partition(", active=")[0].removesuffix(")")
    except Exception as error:
        return type(error), str(error)


@every_layer
@pytest.mark.parametrize(
    "call",
    [
        lambda kind: kind(),
        lambda kind: kind(nonsense=1),
        lambda kind: kind(*range(2, 30)),
        lambda kind: kind("four", 4, 3),
        lambda kind: kind(4, 6, 3, groups=5),
        lambda kind: kind(4, 6, 3, padding_mode="mirror"),
        lambda kind: kind(4, 6, dtype=torch.int64),
        lambda kind: kind(4, 4, 4, channels=neq.ActiveChannels(4)),
        lambda kind: kind(4, 4, 4, grad_input="active"),
    ],
)
def test_bad_arguments_raise_what_torch_raises(name, call):
    kinds = [getattr(namespace, name) for namespace in (neq.nn, nn)]
    if name.startswith("InstanceNorm"):
        kinds = [partial(kind, affine=True) for kind in kinds]
    ours, torchs = (outcome_of(call, kind) for kind in kinds)
    assert ours == torchs


WITHOUT_NEURONS = {
    "it has no weight (affine=False)": [
        ("BatchNorm1d", (6,), {"affine": False}),
        ("BatchNorm2d", (6,), {"affine": False}),
        ("BatchNorm3d", (6,), {"affine": False}),
        ("GroupNorm", (2, 6), {"affine": False}),
        ("InstanceNorm2d", (6,), {}),
    ],
    "it has no weight (elementwise_affine=False)": [
        ("LayerNorm", (6,), {"elementwise_affine": False}),
        ("RMSNorm", (6,), {"elementwise_affine": False}),
    ],
    "it normalises over more than one dimension": [
        ("LayerNorm", ((4, 6),), {}),
        ("RMSNorm", ((4, 6),), {}),
    ],
    "its weight is empty: (0, 4)": [("Linear", (4, 0), {})],
    "its weight is empty: (4, 0)": [("Linear", (0, 4), {})],
    "its weight is empty: (0,)": [("BatchNorm2d", (0,), {}), ("LayerNorm", (0,), {})],
    "its weight is torch.complex64": [
        ("Linear", (4, 6), {"dtype": torch.complex64}),
        ("Conv2d", (4, 6, 3), {"dtype": torch.complex64}),
    ],
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("reason", "name", "arguments", "keywords"),
    [(reason, *case) for reason, cases in WITHOUT_NEURONS.items() for case in cases],
)
def test_layers_without_neurons_are_refused_for_the_reason_that_convert_gives(
    reason, name, arguments, keywords
):
    with pytest.raises(ValueError) as raised:
        getattr(neq.nn, name)(*arguments, **keywords)
    assert str(raised.value) == (
        f"neq.nn.{name}: expected neurons that can be frozen, got none: {reason}; "
        f"use torch.nn.{name}"
    )
    plain = getattr(nn, name)(*arguments, **keywords)
    model = neq.convert(nn.Sequential(plain, nn.Linear(2, 2)))
    assert type(plain) is getattr(nn, name)
    entries = {entry.name: entry.reason for entry in neq.conversion_report(model).modules}
    assert entries.get("0", reason) == reason  # modules without parameters are not listed


# --- copies, checkpoints, torch's tools ----------------------------------------------------------


def through_a_file(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_layer
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_and_independent(name, copied):
    layer = constructed(name)
    layer.channels.set([0, 3])
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert not twin.anchor.shared
    assert twin.anchor is not layer.anchor
    assert_same(step(twin, image(name)), step(layer, image(name)))
    twin.channels.set([1])
    assert layer.channels.mask.tolist() == [True, False, False, True, False, False]


@every_layer
def test_a_shallow_copy_shares_everything(name):
    layer = constructed(name)
    twin = copy.copy(layer)
    assert twin.channels is layer.channels
    assert twin.weight is layer.weight
    twin.channels.set([2])
    assert_same(step(twin, image(name)), step(layer, image(name)))


@every_layer
def test_state_dicts_go_both_ways(name):
    ours, plain = constructed(name), stock(name)
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor.add_(1)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert_same(step(ours, image(name)), step(plain, image(name)))
    fresh = stock(name)
    fresh.load_state_dict(ours.state_dict())
    assert_same(fresh.state_dict().values(), plain.state_dict().values())


# Weight norm's norms are those of input channels, or the layer is masked.
NOT_HELD = ("ConvTranspose", "InstanceNorm", "SyncBatchNorm")


@every_layer
@pytest.mark.parametrize(
    "put_on",
    [parametrizations.weight_norm, lambda layer: prune.random_unstructured(layer, "weight", 2)],
    ids=["weight_norm", "prune"],
)
def test_parametrized_and_pruned(name, put_on):
    results = []
    held = put_on is not parametrizations.weight_norm or not name.startswith(NOT_HELD)
    for layer in (constructed(name), neq.convert(stock(name))):
        torch.manual_seed(0)
        put_on(layer)
        layer.channels.set([0, 3])
        with nullcontext() if held else pytest.warns(UserWarning, match="parametrized after"):
            report = str(neq.conversion_report(layer))
        results.append([*step(layer, image(name)), report])
        if held:
            assert neq.convert(layer, grad_input="active") is layer
        assert isinstance(layer, NeuronLayer) == held
    assert results[0].pop() == results[1].pop()
    assert_same(*results)


@every_layer
def test_jit_trace(name):
    layer = constructed(name).eval()
    layer.channels.set([0, 3])
    x = image(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    assert torch.equal(traced(2 * x), layer(2 * x))


def test_compile_and_specialize():
    torch._dynamo.reset()
    model, x = net(neq.nn), picture()
    for specialized in (False, True):
        neq.specialize(model, specialized)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for n in (6, 3, 0):
            model[0].channels.set(range(n))
            expected = step(model, x)
            if not n and not specialized:
                expected[2] = torch.zeros_like(model[0].weight)  # one graph serves all masks
            for a, b in zip(step(compiled, x), expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# --- a model of them, without convert ------------------------------------------------------------


def twins():
    """A model of constructed layers that convert never saw, and the converted one."""
    return net(neq.nn), neq.convert(net(nn))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_the_converted_model(optimizer):
    models = twins()
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    for each, model in zip(optimizers, models, strict=True):
        neq.attach(each, model)
    for shift in range(3):
        before = copy.deepcopy(models[0])
        for each, model in zip(optimizers, models, strict=True):
            set_masks(model, shift)
            each.zero_grad()
            (model(picture() + shift) - 1).square().mean().backward()
            each.step()
        assert_same(models[0].state_dict().values(), models[1].state_dict().values())
        for layer, old in zip(models[0], before, strict=True):
            if isinstance(layer, NeuronLayer):
                for (p, layout), (was, _) in zip(
                    layer.neuron_parameters(), old.neuron_parameters(), strict=True
                ):
                    frozen = layer.channels.frozen
                    assert torch.equal(layout.gather(p, frozen), layout.gather(was, frozen))
                    assert layer.channels.n_active == 0 or not torch.equal(p, was)


def test_controllers_decide_as_for_the_converted_model():
    masks = []
    for model in twins():
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        neq.attach(optimizer, model)
        neq_controller = neq.NEqController(model, [picture()], eps=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(picture()).square().mean().backward()
            optimizer.step()
            neq_controller.step()
        masks.append([layer.channels.mask.tolist() for _, layer in named_neuron_layers(model)])
        neq.StochasticController(model, 0.5, seed=3, warmup=0)
        masks[-1] += [layer.channels.mask.tolist() for _, layer in named_neuron_layers(model)]
    assert masks[0] == masks[1]
    assert 0 < sum(map(sum, masks[0])) < sum(map(len, masks[0]))


def test_flops_verify_and_tune():
    counts, dense, winners = [], [], []
    for model in twins():
        set_masks(model, 1)
        counts.append(neq.flops.count(model, picture()))
        dense.append(neq.verify(model, picture()))
        table = neq.tune(model, picture(), shares=[1], seconds=1e-4)
        winners.append({name: list(by_count) for name, by_count in table.items()})
    assert counts[0] == counts[1]
    assert dense == [[], []]
    assert winners[0] == winners[1]
    assert list(winners[0]) == ["0", "6", "8"]
