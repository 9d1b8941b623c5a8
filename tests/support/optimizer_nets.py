"""A small model with every kind of neuron layout, and gradients for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neq_kernels.conversion.convert import convert
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.optim import row_steps
from tests.support.backends import cpu

# The implementations of the row steps this machine has.
KERNELS = ["torch"] if cpu.unavailable() else ["torch", "cpu"]

# The group count of transposed convs' weights, whose neurons are no rows.
TRANSPOSED = {"up.weight": 1, "grouped_up.weight": 2}


def use_kernels(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    backend = {"torch": None, "cpu": cpu}[name]
    monkeypatch.setattr(row_steps, "_backend", lambda tensors, layout: backend)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.grouped_up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.linear = nn.Linear(4, 5)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped_up(self.up(self.depthwise(x))))
        return self.linear(x.mean((2, 3))) * self.gain


def make_net(dtype: torch.dtype = torch.float64, channels_last: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net().to(dtype)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    convert(net)
    return net


def plain_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def layers(net: nn.Module) -> dict[str, NeuronLayer]:
    return {name: m for name, m in net.named_modules() if isinstance(m, NeuronLayer)}


def owner_masks(net: nn.Module) -> dict[str, Tensor]:
    """The mask that decides about each neuron-owned parameter, by the parameter's name."""
    return {
        f"{name}.{kind}": layer.channels.mask
        for name, layer in layers(net).items()
        for kind, _ in layer.named_parameters(recurse=False)
    }


def random_masks(net: nn.Module, generator: torch.Generator) -> None:
    """Any number of active neurons per layer, none and all included."""
    for layer in layers(net).values():
        k = len(layer.channels)
        n = int(torch.randint(0, k + 1, (), generator=generator))
        layer.channels.set(torch.randperm(k, generator=generator)[:n])


def frozen_rows(name: str, mask: Tensor, tensor: Tensor) -> list[Tensor]:
    """Copies of the frozen neurons of the parameter (or of a tensor of its shape)."""
    if name in TRANSPOSED:
        per_group = tensor.shape[1]
        blocks = tensor.detach().chunk(TRANSPOSED[name])
        reference = [blocks[k // per_group][:, k % per_group] for k in range(len(mask))]
    else:
        reference = list(tensor.detach())
    return [row.clone() for row, active in zip(reference, mask.tolist(), strict=True) if not active]


def set_gradients(net: nn.Module, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Random gradients; NaN where a neuron is frozen, None where a whole layer is.

    Returns the dense gradients, None where every neuron is frozen.
    """
    masks = owner_masks(net)
    dense: dict[str, Tensor | None] = {}
    for name, p in net.named_parameters():
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        dense[name] = grad
        mask = masks.get(name, torch.ones(1, dtype=torch.bool))
        if not mask.any():
            p.grad = dense[name] = None
            continue
        p.grad = torch.empty_like(p).copy_(grad)
        if name in masks and not mask.all():
            poison(name, mask, p.grad)
    return dense


def poison(name: str, mask: Tensor, grad: Tensor) -> None:
    if name in TRANSPOSED:
        groups = TRANSPOSED[name]
        shape = (groups, grad.shape[0] // groups, *grad.shape[1:])
        grouped = grad.view(shape) if grad.is_contiguous() else grad.unflatten(0, shape[:2])
        grouped.movedim(2, 1)[~mask.view(groups, -1)] = float("nan")
    else:
        grad[~mask] = float("nan")
