"""The layers of neq.nn beside those of torch.nn, alone and in a small network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers

# name: (arguments, keywords, shape of an input); each layer has six neurons
LAYERS = {
    "Linear": ((5, 6), {}, (3, 5)),
    "Conv1d": ((4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
    "Conv2d": ((4, 6, 3), {"padding": "same", "groups": 2, "bias": False}, (2, 4, 7, 6)),
    "Conv3d": ((2, 6, (2, 3, 1)), {"padding_mode": "replicate", "padding": 1}, (2, 2, 4, 5, 3)),
    "ConvTranspose1d": ((4, 6, 3), {"stride": 2}, (2, 4, 5)),
    "ConvTranspose2d": ((4, 6, 3, 2, 1), {"output_padding": 1, "groups": 2}, (2, 4, 5, 4)),
    "ConvTranspose3d": ((2, 6, 2), {"dilation": 2}, (2, 2, 3, 2, 3)),
    "BatchNorm1d": ((6,), {"momentum": 0.3}, (5, 6, 4)),
    "BatchNorm2d": ((6, 1e-4), {}, (3, 6, 4, 4)),
    "BatchNorm3d": ((6,), {"track_running_stats": False}, (3, 6, 2, 3, 2)),
    "Embedding": ((6, 5), {"scale_grad_by_freq": True}, (3, 4)),
    "GroupNorm": ((3, 6), {"eps": 1e-4}, (3, 6, 4, 4)),
    "InstanceNorm1d": ((6,), {"affine": True}, (5, 6, 4)),
    "InstanceNorm2d": ((6,), {"affine": True, "track_running_stats": True}, (3, 6, 4, 4)),
    "InstanceNorm3d": ((6,), {"affine": True}, (6, 2, 3, 2)),
    "RMSNorm": ((6,), {}, (3, 4, 6)),
    "SyncBatchNorm": ((6,), {}, (3, 6, 4, 4)),
    "LayerNorm": (([6],), {"bias": False}, (3, 4, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def constructed(name, **more):
    arguments, keywords, _ = LAYERS[name]
    torch.manual_seed(0)
    return getattr(neq.nn, name)(*arguments, **keywords, **more)


def stock(name, **more):
    arguments, keywords, _ = LAYERS[name]
    torch.manual_seed(0)
    return getattr(nn, name)(*arguments, **keywords, **more)


def image(name, dtype=torch.float32):
    generator, shape = torch.Generator().manual_seed(1), LAYERS[name][2]
    if name == "Embedding":
        return torch.randint(0, 3, shape, generator=generator)
    return torch.randn(shape, dtype=dtype, generator=generator)


def step(layer, x):
    """Output and every gradient of one step."""
    x = x.clone().requires_grad_(x.is_floating_point())
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in layer.parameters())]


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def net(namespace):
    torch.manual_seed(0)
    return nn.Sequential(
        namespace.Conv2d(3, 6, 3, padding=1, bias=False),
        namespace.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        namespace.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        namespace.GroupNorm(2, 4),
        nn.Flatten(),
        namespace.Linear(400, 8),
        namespace.LayerNorm(8),
        namespace.Linear(8, 3),
    )


def picture():
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def set_masks(model, shift):
    *hidden, (_, head) = named_neuron_layers(model)
    for i, (_, layer) in enumerate(hidden):
        k = len(layer.channels)
        layer.channels.set([(c + i + shift) % 3 != 0 for c in range(k)] if i != shift else [])
    head.channels.set([shift % 3])


class Scaled(nn.Module):
    """A constructed layer with a scale no neuron owns."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = neq.nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.scale
