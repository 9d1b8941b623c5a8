"""Small models of many kinds, and what becomes of them when they are converted."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle


def entries(model):
    return {entry.name: entry for entry in neq.conversion_report(model).modules}


def converted(model):
    return [name for name, _ in named_neuron_layers(model)]


class OwnLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.tanh(), self.bias)


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def tiny_swin(**options):
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=5,
        stochastic_depth_prob=0.2,
        dropout=0.1,
        **options,
    )


def tiny_vit():
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20,
        num_classes=5,
    )  # fmt: skip


def tiny_convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5)


def output_of(model, x, seed=0):
    torch.manual_seed(seed)
    out = model(x)
    return torch.cat([o.flatten() for o in out.values()]) if isinstance(out, dict) else out


def set_ragged(model, shift=0):
    for _, layer in named_neuron_layers(model):
        k = len(layer.channels)
        layer.channels.set([(i + shift) % 3 != 1 for i in range(k)])


def assert_model_gradients(ours, plain):
    owners = neuron_owners(ours)
    for (name, parameter), dense in zip(ours.named_parameters(), plain.parameters(), strict=True):
        exact = dense.grad
        if parameter in owners:
            ((channels, layout),) = owners[parameter]
            exact = exact.clone()
            layout.fill_(exact, channels.frozen, 0)
            assert bool((layout.gather(parameter.grad, channels.frozen) == 0).all()), name
        oracle.assert_close64(parameter.grad, exact, 1e-9)


class Scaled(nn.Module):
    """A linear layer with a scale no neuron owns."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        if x.shape[-1] != 4:
            raise ArithmeticError("on purpose")
        return self.linear(x) * self.scale


def freeze(model, but=()):
    for name, layer in named_neuron_layers(model):
        if name not in but:
            layer.channels.set([])


def product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Reads a weight where convert does not look for it: outside of any forward."""
    return nn.functional.linear(x, layer.weight, layer.bias)


class Bypassing(nn.Module):
    """Uses one layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self.called(x), self.bypassed)
