"""The neuron class of each layer type."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torchvision.models.video.resnet import Conv3DSimple

import neq_kernels as neq
from neq_kernels.conversion.neuron_classes import NEURON_CLASSES, neuron_class
from neq_kernels.layers import linear
from neq_kernels.layers.base import NeuronLayer, stock_class
from tests.support import oracle
from tests.support.models import OwnLinear, entries


class Documented(nn.Linear):
    """What the original says."""

    def __init__(self, width, scale=2.0):
        super().__init__(width, width)
        self.scale = scale

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.ones_(self.bias)

    def extra_repr(self):
        return f"{super().extra_repr()}, scale={self.scale}"

    def times(self):
        return self.scale


@pytest.mark.parametrize(("stock", "ours"), NEURON_CLASSES.items())
def test_the_table(stock, ours):
    assert neuron_class(stock) is ours
    assert stock_class(ours) is stock


def test_a_subclass_that_inherits_its_forward():
    layer = Documented(4)
    before, x = repr(layer), torch.randn(3, 4)
    expected = layer(x)
    neq.convert(layer)
    assert isinstance(layer, NeuronLayer)
    assert isinstance(layer, Documented)
    kind = type(layer)
    assert (kind.__name__, kind.__qualname__, kind.__module__, kind.__doc__) == (
        "Documented", Documented.__qualname__, __name__, "What the original says.",
    )  # fmt: skip
    assert repr(layer) == f"{before[:-1]}, active=4/4)"
    assert layer.times() == 2.0
    layer.channels.set([1])
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [False, True, False, False])
    assert entries(layer)[""].kind == "Documented"
    neq.revert(layer)
    assert type(layer) is Documented
    assert repr(layer) == before


def test_the_class_is_made_once_and_lives_no_longer_than_its_layers():
    assert neuron_class(Documented) is neuron_class(Documented)
    assert stock_class(neuron_class(Documented)) is Documented

    def once():
        kind = type("Brief", (nn.Linear,), {})
        return weakref.ref(neuron_class(kind)), weakref.ref(kind)

    refs = once()
    for _ in range(2):  # the table lets go of the original when the neuron class is collected
        gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("make", [lambda: Documented(4, 3.0), lambda: Conv3DSimple(2, 4)])
def test_copies(make, copied):
    layer = neq.convert(make())
    layer.channels.set([1, 3])
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.channels.mask.tolist() == layer.channels.mask.tolist()
    assert (twin.channels is layer.channels) == (copied is copy.copy)
    assert torch.equal(twin.weight, layer.weight)
    assert repr(twin) == repr(layer)
    pickled = pickle.dumps(layer)
    assert type(layer).__name__.encode() in pickled
    assert type(neq.revert(pickle.loads(pickled))) is stock_class(type(layer))


def test_a_class_without_neurons_where_a_pickle_is_loaded(monkeypatch):
    pickled = pickle.dumps(neq.convert(Documented(4)))
    monkeypatch.setattr(Documented, "forward", OwnLinear.forward, raising=False)
    from neq_kernels.conversion import neuron_classes

    monkeypatch.setattr(neuron_classes, "_made", {})
    with pytest.raises(TypeError, match=r"Documented: .* neq\.register"):
        pickle.loads(pickled)


def test_the_class_constructs_as_the_original():
    kind = neuron_class(Documented)
    layer = kind(3, scale=5.0)
    assert type(layer) is kind
    assert layer.scale == 5.0
    assert len(layer.channels) == 3


def test_torchvisions_conv():
    layer = Conv3DSimple(2, 4)
    neq.convert(layer)
    assert type(layer).get_downsample_stride(2) == (2, 2, 2)
    layer.channels.set([2])
    layer(torch.randn(1, 2, 3, 3, 3)).sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [False, False, True, False])


REDEFINES = {
    "forward": (nn.Linear, (3, 4)),
    "__call__": (nn.Linear, (3, 4)),
    "_conv_forward": (nn.Conv2d, (3, 4, 1)),
    "_output_padding": (nn.ConvTranspose2d, (3, 4, 1)),
    "__getattr__": (nn.Linear, (3, 4)),
}


@pytest.mark.parametrize("name", REDEFINES)
def test_what_computes_otherwise_is_left_alone(name):
    base, arguments = REDEFINES[name]

    def other(self, *args, **kwargs):
        return getattr(base, name)(self, *args, **kwargs)

    kind = type("Other", (base,), {name: other})
    assert neuron_class(kind) is None
    assert neuron_class(type("Further", (kind,), {})) is None
    layer = kind(*arguments)
    model = neq.convert(nn.Sequential(layer, nn.Linear(2, 2)))
    assert type(layer) is kind
    reason = entries(model)["0"].reason
    assert reason == f"a subclass of {base.__name__} with its own {name}; see neq.register"


OF_NORMS = {
    "forward": (lambda: (nn.LayerNorm, (4,)), -1),
    "_check_input_dim": (lambda: (nn.BatchNorm1d, (4,)), 1),
    "_get_no_batch_dim": (lambda: (nn.InstanceNorm1d, (4, 1e-5, 0.1, True)), 1),
    "__call__": (lambda: (nn.GroupNorm, (2, 4)), 1),
}


@pytest.mark.parametrize("name", OF_NORMS)
def test_a_norm_that_computes_otherwise_is_masked(name):
    """Whatever it computes, an entry of its parameters belongs to one channel."""
    make, dim = OF_NORMS[name]
    base, arguments = make()

    def other(self, *args, **kwargs):
        out = getattr(base, name)(self, *args, **kwargs)
        return out * 2 if isinstance(out, torch.Tensor) else out

    layer = type("Other", (base,), {name: other})(*arguments)
    x = torch.randn(3, 4, 4)
    expected = layer(x)
    neq.convert(layer)
    layer.channels.set([1])
    out = layer(x)
    assert torch.equal(out, expected)
    assert layer.channel_dim(out) == dim % 3
    out.square().sum().backward()
    assert layer.weight.grad.ne(0).tolist() == [False, True, False, False]
    layer.channels.set([])
    assert not layer(x).requires_grad


def test_a_norm_that_reads_other_parameters_is_left_alone():
    kind = type("Other", (nn.LayerNorm,), {"__getattr__": nn.Module.__getattr__})
    assert neuron_class(kind) is None


class LlamaRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class SummingRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).sum(-1)


class BoundRMSNorm(LlamaRMSNorm):
    def __init__(self, width):
        super().__init__(width)
        self.bound = nn.Parameter(torch.ones(()))


def test_an_rms_norm_is_known_by_its_name():
    layer, x = LlamaRMSNorm(4), torch.randn(2, 3, 4)
    expected = layer(x)
    model = neq.convert(nn.Sequential(layer))
    assert layer.is_norm
    layer.channels.set([0, 2])
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert layer.weight.grad.ne(0).tolist() == [True, False, True, False]
    assert layer.channel_dim(expected) == 2
    assert repr(layer) == "LlamaRMSNorm(active=2/4)"


def test_a_name_that_promised_too_much():
    model = neq.convert(nn.Sequential(SummingRMSNorm(4)))
    with pytest.raises(ValueError, match=r"SummingRMSNorm: .*last dimension.*4, got \(2, 3\)"):
        model(torch.randn(2, 3, 4))
    layer = BoundRMSNorm(4)
    neq.convert(nn.Sequential(layer, nn.Linear(2, 2)))
    assert type(layer) is BoundRMSNorm
    reason = entries(nn.Sequential(layer))["0"].reason
    assert "['bound', 'weight']; see neq.register" in reason


class Around(nn.Linear):
    """Computes around its base's forward, and asks its weight for nothing but its dtype."""

    def forward(self, x, scale=1.0):
        return self.after(super().forward(x.to(self.weight.dtype)) * scale), scale

    def after(self, out):
        return out.relu()


class Further(Around):
    pass


class ReadsInAMethod(Around):
    def after(self, out):
        return out + self.weight.sum()


class CallsItsBase(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x).relu()


@pytest.mark.parametrize("kind", [Around, Further])
def test_a_forward_around_its_bases_keeps_the_kernels(kind):
    layer, x = kind(3, 4), torch.randn(5, 3)
    expected, _ = layer(x, scale=2.0)
    neq.convert(layer)
    assert isinstance(layer, linear.Linear)
    assert isinstance(layer, kind)
    layer.channels.set([1])
    out, scale = layer(x, scale=2.0)
    assert torch.equal(out, expected)
    assert scale == 2.0
    out.square().sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [False, True, False, False])
    counted = neq.flops.count(layer, x)
    assert (counted.macs, counted.wgrad) == (12, 2 * 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], layer(x)[0])
    layer.channels.set([])
    assert not layer(x)[0].requires_grad
    assert repr(layer).endswith(", active=0/4)")
    assert type(neq.revert(layer)) is kind


@pytest.mark.parametrize("kind", [ReadsInAMethod, CallsItsBase, OwnLinear])
def test_a_forward_that_reads_parameters_itself_is_left_alone(kind):
    assert neuron_class(kind) is None


def test_a_class_without_source_is_left_alone():
    namespace = {"nn": nn}
    exec("class K(nn.Linear):\n def forward(self, x):\n  return super().forward(x)", namespace)
    assert neuron_class(namespace["K"]) is None
