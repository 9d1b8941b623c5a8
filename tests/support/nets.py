"""Small converted models, a little training, and a picture of everything a controller may touch."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor, nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers


def conv_net() -> nn.Module:
    """Convs, batch norms, in-place activations, dropout, a linear head."""
    return neq.convert(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8, 5),
        )
    )


class Block(nn.Module):
    """A token mixer on (B, L, C) with a residual path and a class token."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.down(torch.tanh(self.up(self.norm(x + x.mean(1, keepdim=True)))))
        return self.head(x[:, 0])


def images(n_batches: int = 3, batch: int = 4, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 6, 6, generator=generator) for _ in range(n_batches)]


def tokens(n_batches: int = 3, batch: int = 4, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 5, 6, generator=generator) for _ in range(n_batches)]


def train(model: nn.Module, data: list[Tensor], lr: float = 0.05, seed: int = 0) -> None:
    """One short epoch of plain SGD."""
    modes = {m: m.training for m in model.modules()}
    model.train()
    torch.manual_seed(seed)
    for x in data:
        model.zero_grad()
        (model(x) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    for module, mode in modes.items():
        module.training = mode


def wiggle(model: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Move every parameter and every floating-point buffer, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.mul_(1 + scale * noise.to(tensor)).add_(scale * noise.flip(0).to(tensor))


class Rotating(nn.Module):
    """``hidden`` answers the probe :attr:`probe` with its own weight rows.

    Turning a row by ``acos(phi)`` in the plane therefore gives its neuron exactly this φ.
    """

    def __init__(self, n_neurons: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, n_neurons, bias=False, dtype=torch.float64)
        self.head = nn.Linear(n_neurons, 1, dtype=torch.float64)
        self.angles = [0.0] * n_neurons
        self.turn([1.0] * n_neurons)
        neq.convert(self)

    @property
    def probe(self) -> list[Tensor]:
        return [row[None].double() for row in torch.eye(2)]

    def turn(self, phis: list[float]) -> None:
        """Give the neurons these φ against the weights they have now."""
        self.angles = [a + math.acos(phi) for a, phi in zip(self.angles, phis, strict=True)]
        rows = [[math.cos(a), math.sin(a)] for a in self.angles]
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor(rows, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def masks(model: nn.Module) -> dict[str, list[bool]]:
    return {name: layer.channels.mask.tolist() for name, layer in named_neuron_layers(model)}


def picture(model: nn.Module) -> dict[str, object]:
    """Everything that evaluating a model may disturb, by value."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {n: (id(t), t.detach().clone().tolist()) for n, t in named},
        "requires_grad": {n: t.requires_grad for n, t in model.named_parameters()},
        "gradients": {
            n: None if t.grad is None else (id(t.grad), t.grad.tolist())
            for n, t in model.named_parameters()
        },
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: [(key, list(v)) for key, v in vars(m).items() if "hook" in key and v]
            for n, m in model.named_modules()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "masks": masks(model),
        "generations": {n: la.channels.generation for n, la in named_neuron_layers(model)},
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same(found: object, expected: object) -> None:
    """Nested state, tensors bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected
