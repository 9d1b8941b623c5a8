"""A residual block, and masks that change from step to step, for trainings on a GPU's kernels."""

from __future__ import annotations

import torch
from torch import nn

from neq_kernels.layers.traversal import named_neuron_layers


class Block(nn.Module):
    def __init__(self, c: int, k: int, stride: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, groups=groups, bias=bias)
        self.norm1, self.norm2 = nn.BatchNorm2d(k), nn.BatchNorm2d(k)
        self.shortcut = nn.Conv2d(c, k, 1, stride, bias=False)

    def forward(self, x):
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


def masks(model: nn.Module, step: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(100 + step)
    chosen = {}
    for i, (name, layer) in enumerate(named_neuron_layers(model)):
        k = len(layer.channels)
        n = (1, k // 2, k - 1, 0)[(i + step) % 4] if name != "5" else k - 1
        chosen[name] = torch.randperm(k, generator=generator)[:n].tolist()
    return chosen
