"""What other tools do to a converted model: layers built anew, parametrized, pruned, hooked,
wrapped, quantised."""

from __future__ import annotations

import copy
import functools
import types
import warnings

import accelerate.hooks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners, unwrap
from tests.support.models import converted, entries


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


# --- layers built anew ---------------------------------------------------------------------------

AFTER = {
    "attach": lambda model: neq.attach(torch.optim.SGD(model.parameters(), lr=0.1), model),
    "controller": lambda model: neq.FixedController(model, {}),
    "convert": neq.convert,
}


@pytest.mark.parametrize("then", AFTER)
def test_convert_then_sync_batch_norm(then):
    model = neq.convert(net())
    model[1].channels.set([1, 2])
    channels = model[1].channels
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    with pytest.warns(UserWarning, match=r"built anew .* have their neurons and masks back: 1$"):
        AFTER[then](model)
    assert isinstance(model[1], neq.nn.SyncBatchNorm)
    assert model[1].channels is channels
    if then != "controller":
        assert channels.mask.tolist() == [False, True, True, False]
    channels.set([1, 2])
    model[1].train(False)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert model[1].weight.grad.ne(0).tolist() == [False, True, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AFTER[then](model)


def test_sync_batch_norm_then_convert():
    model = neq.convert(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    assert converted(model) == ["0", "1", "4"]
    model[1].channels.set([0])
    assert type(neq.revert(model)[1]) is nn.SyncBatchNorm


def test_between_two_steps_of_an_attached_optimizer():
    model = neq.convert(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    neq.attach(optimizer, model)
    model[1].channels.set([1])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before = model[1].weight.detach().clone()
    model.eval()(torch.randn(2, 3, 5, 5)).square().sum().backward()
    with pytest.warns(UserWarning, match="built anew"):
        optimizer.step()
    assert (model[1].weight != before).tolist() == [False, True, False, False]


def test_a_layer_built_anew_without_neurons_is_named():
    class Norm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.scale, self.shift = norm.weight, norm.bias

    model = neq.convert(net())
    model[1] = Norm(model[1])
    with pytest.warns(UserWarning, match=r"no neurons: all of their channels train on: 1$"):
        neq.convert(model)


def test_a_reverted_layer_is_not_repaired():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    neq.revert(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AFTER["attach"](model)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("shared", [False, True])
def test_rows_removed_by_a_pruning_tool(shared):
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    model[0].channels.set([1])
    model[0].weight = nn.Parameter(model[0].weight.detach()[:3])
    model[0].bias = nn.Parameter(model[0].bias.detach()[:3])
    model[0].out_features = 3
    model[1].weight = nn.Parameter(model[1].weight.detach()[:, :3])
    with pytest.warns(UserWarning, match="^0: it had 4 neurons and has 3 now; all of them"):
        neq.convert(model)
    assert model[0].channels.n_active == len(model[0].channels) == 3
    model[0].channels.set([0, 2])
    model(torch.randn(2, 3)).square().sum().backward()
    assert model[0].weight.grad.ne(0).any(1).tolist() == [True, False, True]


# --- computed weights ----------------------------------------------------------------------------

ROW_BY_ROW = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 2),
}
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 2), (3, 2, 4, 4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tool", ROW_BY_ROW)
@pytest.mark.parametrize("before", [False, True], ids=["after convert", "before"])
def test_neurons_of_a_weight_computed_row_by_row_are_held(name, tool, before):
    make, shape = LAYERS[name]
    layer = make()
    stock = type(layer)
    for step in (ROW_BY_ROW[tool], neq.convert) if before else (neq.convert, ROW_BY_ROW[tool]):
        torch.manual_seed(0)
        step(layer)
    model = nn.Sequential(layer)
    assert entries(model)["0"].converted
    assert all(e.converted for e in entries(model).values())
    assert set(neuron_owners(model)) == set(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    neq.attach(optimizer, model)
    x = torch.randn(shape)
    model(x).square().sum().backward()
    optimizer.step()  # momentum and weight decay have something to go on with
    layer.channels.set([1])
    before = model(x).detach()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    moved = (model(x) != before).movedim(1, 0).flatten(1).any(1)
    assert moved.tolist() == [False, True, False, False]
    neq.revert(model)
    assert not isinstance(layer, NeuronLayer)
    model(x).sum().backward()
    if tool == "weight_norm":
        parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is stock


COUPLED = {
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight_norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "own": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Softmax(0)),
    "old spectral_norm": spectral_norm,
}


@pytest.mark.parametrize("tool", COUPLED)
@pytest.mark.parametrize("look", [neq.conversion_report, AFTER["attach"]], ids=["report", "attach"])
def test_a_layer_whose_neurons_depend_on_one_another_is_unconverted_loudly(tool, look):
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    model[1].channels.set([1])
    COUPLED[tool](model[1])
    with pytest.warns(UserWarning, match=r"^1: its (weight|bias) was parametrized after convert"):
        look(model)
    assert not isinstance(model[1], NeuronLayer)
    assert isinstance(model[1], nn.Linear)
    assert "channels" not in vars(model[1])
    assert converted(model) == ["0"]
    plain = copy.deepcopy(model)
    model(torch.ones(2, 3)).square().sum().backward()
    plain(torch.ones(2, 3)).square().sum().backward()
    for ours, theirs in zip(model[1].parameters(), plain[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    if tool != "old spectral_norm":
        name = "bias" if tool == "own" else "weight"
        parametrize.remove_parametrizations(model[1], name)
        assert type(model[1]) is nn.Linear
        neq.convert(model)
        assert converted(model) == ["0", "1"]


def test_revert_under_a_parametrization():
    layer = neq.convert(nn.Linear(3, 4))
    parametrizations.weight_norm(layer)
    neq.revert(layer)
    assert not isinstance(layer, NeuronLayer)
    layer(torch.ones(2, 3)).sum().backward()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


# --- forwards replaced on the layer --------------------------------------------------------------


class Noting(accelerate.hooks.ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def frozen_rows(layer):
    """Which rows get no gradient from a forward with rows 0 and 2 active."""
    layer.channels.set([0, 2])
    layer.zero_grad()
    layer(torch.ones(2, 3)).sum().backward()
    return layer.weight.grad.eq(0).all(1).tolist()


HALF = [False, True, False, True]


@pytest.mark.parametrize("before", [True, False])
def test_accelerates_hooks_before_and_after_convert(before):
    layer, hook = nn.Linear(3, 4), Noting()
    if before:
        accelerate.hooks.add_hook_to_module(layer, hook)
    neq.convert(layer)
    if not before:
        accelerate.hooks.add_hook_to_module(layer, hook)
    assert entries(layer)[""].converted
    assert frozen_rows(layer) == HALF
    assert hook.calls == 1
    neq.revert(layer)
    layer(torch.ones(2, 3)).sum().backward()
    assert hook.calls == 2
    accelerate.hooks.remove_hook_from_module(layer)
    neq.convert(layer)
    assert frozen_rows(layer) == HALF
    neq.revert(layer)
    layer(torch.ones(2, 3)).sum().backward()
    assert type(layer) is nn.Linear


def own_forward(self, input):
    return F.linear(input, self.weight, self.bias)


def wrapped(layer):
    forward = layer.forward

    @functools.wraps(forward)
    def call(*args):
        return forward(*args)

    return call


def closed_over(layer):
    forward = layer.forward
    return lambda x: forward(x)


WRAPPERS = {
    "compiled": lambda layer: torch.compile(layer.forward, backend="eager"),
    "wrapped": wrapped,
    "closed over": closed_over,
    "partial": lambda layer: functools.partial(layer.forward),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_forward_wrapped_on_the_layer(wrapper):
    layer = nn.Linear(3, 4)
    layer.forward = WRAPPERS[wrapper](layer)
    neq.convert(nn.Sequential(layer, nn.Linear(4, 4)))
    assert type(layer) is nn.Linear
    reason = "its forward was replaced on the layer itself, before convert"
    assert entries(layer)[""].reason == reason
    layer = neq.convert(nn.Linear(3, 4))
    layer.forward = WRAPPERS[wrapper](layer)
    assert entries(layer)[""].converted
    assert frozen_rows(layer) == HALF
    with pytest.raises(ValueError, match=r"delete it first: del layer\.forward"):
        neq.revert(layer)
    assert frozen_rows(layer) == HALF
    del layer.forward
    assert type(neq.revert(layer)) is nn.Linear


def test_a_forward_that_does_not_call_the_layers_is_reported():
    layer = neq.convert(nn.Linear(3, 4))
    layer.forward = types.MethodType(own_forward, layer)
    assert not entries(layer)[""].converted
    assert "replaced after convert" in entries(layer)[""].reason
    neq.revert(layer)
    layer(torch.ones(2, 3)).sum().backward()


# --- wrappers, quantisation, dtypes --------------------------------------------------------------


def test_fabrics_wrapper_is_seen_through():
    class FabricModule(nn.Module):  # as lightning.fabric.wrappers has it
        def __init__(self, forward_module, original_module):
            super().__init__()
            self._forward_module = forward_module
            self._original_module = original_module

    model = net()
    wrapped = FabricModule(nn.DataParallel(model), model)
    assert unwrap(wrapped) is model
    neq.convert(wrapped)
    assert [name for name, _ in named_neuron_layers(wrapped)] == ["0", "1", "4"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_says_what_it_misses():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4)))
    with pytest.warns(UserWarning, match=r"quantisation .* call neq\.revert\(model\) first"):
        torch.ao.quantization.quantize_dynamic(model)
    neq.revert(model)
    assert not hasattr(model[0], "qconfig")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model)
    assert "quantized" in type(quantised[0]).__module__


def test_qconfig_is_an_attribute_like_any_other():
    layer = neq.convert(nn.Linear(3, 4))
    assert not hasattr(layer, "qconfig")
    with pytest.warns(UserWarning, match="quantisation"):
        layer.qconfig = "kept"
    assert layer.qconfig == "kept"


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("active", [[0, 1, 2, 3], [1], []])
def test_complex_after_convert(active):
    for make, shape in ((lambda: nn.Linear(3, 4), (2, 3)), (lambda: nn.Conv1d(3, 4, 2), (2, 3, 5))):
        plain = make()
        layer = neq.convert(copy.deepcopy(plain)).to(torch.cfloat)
        plain = plain.to(torch.cfloat)
        layer.channels.set(active)
        x = torch.randn(shape, dtype=torch.cfloat)
        out, expected = layer(x), plain(x)
        assert torch.equal(out, expected)
        expected.abs().sum().backward()
        if active:
            out.abs().sum().backward()
            frozen = [i for i in range(4) if i not in active]
            assert bool((layer.weight.grad[frozen] == 0).all())
            torch.testing.assert_close(layer.weight.grad[active], plain.weight.grad[active])
