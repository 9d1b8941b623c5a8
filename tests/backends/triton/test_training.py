"""A small ResNet trained while its masks change, every weight gradient by the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.backends.triton import conv_wgrad, depthwise_wgrad, linear_wgrad
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle
from tests.support.backends import triton
from tests.support.gpu_cases import DTYPES, EXECUTOR
from tests.support.resnet import Block, masks

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        # Fewer inputs than 8 would end in oneDNN's heap corruption (see backends.aten).
        Block(8, 6, 2, 1),
        Block(6, 8, 1, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, 6, 6, generator=generator)
    return images, torch.randint(5, (2,), generator=generator)


def counted(monkeypatch, module, name: str) -> list[str]:
    """Grows by one with each call of a function."""
    calls, function = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("strategy", [Strategy.CUSTOM, Strategy.PACK])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_equals_the_dense_one_with_its_frozen_rows_put_back(
    layout, strategy, device, monkeypatch
):
    """Gradients, optimizer steps and the similarities of the controller."""
    assert EXECUTOR == "cuda" or selector.backends_for("cuda")[0] == "triton"
    plain = network().double()
    model = neq.convert(copy.deepcopy(plain).float().to(device, memory_format=layout))
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    neq.attach(steps[1], model)
    mirror = neq.convert(copy.deepcopy(plain))
    images, _ = batch(STEPS)
    exact = neq.NEqController(mirror, [images.double()])
    controller = neq.NEqController(model, [images.to(device, memory_format=layout)])
    steps_by_kernels = counted(monkeypatch, triton, "sgd_rows_")
    for step in range(STEPS):
        active = masks(model, step)
        for name, layer in named_neuron_layers(model):
            layer.channels.set(torch.tensor(active[name], dtype=torch.int64))
        images, labels = batch(step)
        F.cross_entropy(plain(images.double()), labels).backward()
        with selector.forced_strategy(strategy):
            on_device = images.to(device, memory_format=layout)
            F.cross_entropy(model(on_device), labels.to(device)).backward()
        for name, layer in named_neuron_layers(model):
            theirs = plain.get_submodule(name)
            for parameter, reference in zip(layer.parameters(), theirs.parameters(), strict=True):
                frozen = [i for i in range(len(parameter)) if i not in active[name]]
                if parameter.grad is not None:
                    assert not parameter.grad[frozen].any()
                reference.grad[frozen] = 0
                if active[name]:
                    difference = parameter.grad.double().cpu() - reference.grad
                    assert oracle.largest(difference) < 1e-4 * max(
                        1, oracle.largest(reference.grad)
                    )
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
        mirror.load_state_dict(plain.state_dict())
        for each in (exact, controller):
            each.step()
        for name, phi in exact.state_dict()["phi"].items():
            assert oracle.largest(controller.state_dict()["phi"][name] - phi) < 1e-5
    assert len(steps_by_kernels) == STEPS
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert oracle.largest(parameter.double().cpu() - reference) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_functions_reach_the_kernels(dtype, device, monkeypatch):
    served = {
        module: counted(monkeypatch, module, name)
        for module, name in (
            (conv_wgrad, "conv_wgrad"),
            (depthwise_wgrad, "depthwise_wgrad"),
            (linear_wgrad, "linear_wgrad"),
        )
    }
    channels = neq.ActiveChannels(6)
    channels.set([1, 4])
    x, w = torch.randn(2, 6, 4, 4), torch.randn(6, 6, 3, 3)
    for weight, groups in ((w, 1), (w[:, :1], 6), (w[:, :3], 2)):
        leaf = weight.clone().to(device, dtype).requires_grad_()
        neq.functional.conv(
            x.to(device, dtype), leaf, None, channels, padding=1, groups=groups
        ).sum().backward()
        assert not leaf.grad[channels.frozen].any()
        assert leaf.grad[channels.active].any()
    leaf = w[:, :, 0, 0].clone().to(device, dtype).requires_grad_()
    neq.functional.linear(x[..., 0].mT.to(device, dtype), leaf, None, channels).sum().backward()
    assert [len(calls) for calls in served.values()] == [2, 1, 1]
