"""A small ResNet trained while its masks change: weight gradients and optimizer steps by the
kernels, through the backend's own host code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle
from tests.support.cuda_cases import DEVICE
from tests.support.resnet import Block, masks

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    # With a bias in front of a norm gradients that are zero but for rounding would steer Adam.
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        Block(8, 40, 2, 1, bias=False),
        Block(40, 24, 1, 24, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 8),
    )


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(3, 4, 8, 8, generator=generator)
    return images, torch.randint(8, (3,), generator=generator)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", [Strategy.CUSTOM, Strategy.PACK])
def test_training_equals_the_references(strategy, optimizer, ops):
    """The reference: in float64, by PyTorch's operators alone."""
    plain = neq.convert(network().double())
    model = neq.convert(copy.deepcopy(neq.revert(plain)).float())
    model = model.to(DEVICE, memory_format=torch.channels_last)
    plain = neq.convert(plain)
    make, settings = OPTIMIZERS[optimizer]
    both = [(m, make(m.parameters(), **settings)) for m in (plain, model)]
    for m, each in both:
        neq.attach(each, m)
    images, _ = batch(STEPS)
    with oracle.forced_backend("reference"):
        exact = neq.NEqController(plain, [images.double()])
    last = {"device": DEVICE, "memory_format": torch.channels_last}
    controller = neq.NEqController(model, [images.to(**last)])
    for step in range(STEPS):
        images, labels = batch(step)
        for m, each in both:
            for name, layer in named_neuron_layers(m):
                layer.channels.set(torch.tensor(masks(model, step)[name], dtype=torch.int64))
            each.zero_grad()
        with oracle.forced_backend("reference"):
            F.cross_entropy(plain(images.double()), labels).backward()
            both[0][1].step()
        with selector.forced_strategy(strategy):
            F.cross_entropy(model(images.to(**last)), labels.to(DEVICE)).backward()
        for _, layer in named_neuron_layers(model):
            for parameter in layer.parameters():
                assert parameter.grad is None or not parameter.grad[layer.channels.frozen].any()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None or not ours.grad.any()
                continue
            difference = oracle.largest(ours.grad.double().cpu() - theirs.grad)
            assert difference < 1e-4 * max(1, oracle.largest(theirs.grad))
        both[1][1].step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert oracle.largest(ours.double().cpu() - theirs) < 1e-4
        with oracle.forced_backend("reference"):
            exact.step()
        controller.step()
        for name, phi in exact.state_dict()["phi"].items():
            assert oracle.largest(controller.state_dict()["phi"][name].cpu() - phi) < 1e-4
    kernels = {
        Strategy.CUSTOM: ("linear_wgrad", "conv_wgrad", "depthwise_wgrad"),
        Strategy.PACK: ("pack", "scatter_rows"),
    }[strategy]
    for name in kernels:
        assert ops.calls[name] > 0, name
    assert ops.calls["sgd_rows_" if optimizer == "sgd" else "adam_rows_"] == STEPS
