"""The layers, layouts and optimizers that ``neq_kernels.doctor.gradients`` checks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from neq_kernels.channels import NeuronLayout


@dataclass(frozen=True)
class Case:
    """A layer: ``conv`` holds the keyword arguments of :func:`neq_kernels.functional.conv`, None
    makes it a linear layer."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    conv: dict[str, Any] | None = field(default_factory=dict)
    channels_last: bool = False

    @property
    def n_channels(self) -> int:
        transposed = self.conv is not None and self.conv.get("transposed", False)
        groups = self.conv.get("groups", 1) if self.conv else 1
        return self.weight[1] * groups if transposed else self.weight[0]


LINEAR_CASES = (
    Case("linear", (5, 7), (6, 7), None),
    Case("linear, 3 dimensions", (2, 3, 16), (32, 16), None),
)
CONV_CASES = (
    Case("conv 3x3", (2, 5, 9, 8), (6, 5, 3, 3), {"padding": 1}),
    Case("conv 3x3, channels_last", (2, 5, 9, 8), (6, 5, 3, 3), {"padding": 1}, True),
    Case("conv 3x3, stride 2", (2, 16, 9, 9), (16, 16, 3, 3), {"stride": 2, "padding": 1}),
    Case("conv 1x1, channels_last", (2, 8, 6, 6), (12, 8, 1, 1), {}, True),
    Case("conv, dilated", (1, 4, 11, 11), (6, 4, 3, 3), {"dilation": 2, "padding": "same"}),
    Case("conv, grouped", (2, 6, 8, 8), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    Case("conv, depthwise", (2, 8, 8, 8), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
    Case(
        "conv, depthwise, channels_last",
        (2, 8, 8, 8),
        (8, 1, 5, 5),
        {"groups": 8, "padding": 2},
        True,
    ),
    Case("conv 1d", (2, 4, 13), (6, 4, 3), {"stride": 2}),
    Case("conv 3d", (2, 3, 5, 6, 4), (6, 3, 2, 3, 2), {"padding": 1}),
    Case(
        "transposed conv",
        (2, 4, 5, 5),
        (4, 6, 3, 3),
        {"transposed": True, "stride": 2, "output_padding": 1},
    ),
    Case(
        "transposed conv, grouped",
        (2, 4, 5, 5),
        (4, 3, 3, 3),
        {"transposed": True, "groups": 2, "stride": 2},
    ),
)
# What custom kernels for GPUs tell apart: rows and images of 16-byte vectors, few and many of them,
# sizes of tiles, strides, sides of kernels.
GPU_LINEAR_CASES = (
    Case("linear, wide", (600, 72), (160, 72), None),
    Case("linear, 48 features", (300, 136), (48, 136), None),
    Case("linear, long", (200, 1040), (32, 1040), None),
)
GPU_CONV_CASES = (
    *(
        Case(
            f"conv 3x3, {c} channels, {k} features",
            (2, c, 5, width),
            (k, c, 3, 3),
            {"padding": 1},
            True,
        )
        for c, k, width in ((64, 16, 8), (128, 16, 16), (256, 32, 14), (320, 16, 7), (24, 80, 12))
    ),
    Case("conv 3x3, strided", (2, 24, 13, 12), (40, 24, 3, 3), {"stride": 2, "padding": 1}, True),
    Case("conv 3x3, wide dilation", (2, 24, 9, 8), (40, 24, 3, 3), {"dilation": 2}, True),
    Case("conv 1x1, 16 features", (2, 40, 9, 8), (16, 40, 1, 1), {}, True),
    *(
        Case(
            f"conv, depthwise {side}x{side}, stride {stride}" + ", channels_last" * last,
            (3, 32, 19, 17),
            (32, 1, side, side),
            {"groups": 32, "padding": side // 2, "stride": stride},
            last,
        )
        for side, stride, last in itertools.product((3, 5, 7), (1, 2), (False, True))
    ),
)
CASES = {"linear_backward": LINEAR_CASES, "conv_backward": CONV_CASES}
GPU_CASES = {"linear_backward": GPU_LINEAR_CASES, "conv_backward": GPU_CONV_CASES}
LAYOUTS = (
    ("rows", (6, 5, 3, 3), NeuronLayout(), False),
    ("rows, channels_last", (6, 5, 3, 3), NeuronLayout(), True),
    ("vector", (7,), NeuronLayout(), False),
    ("transposed", (4, 6, 3, 3), NeuronLayout(1, axis=1), False),
    ("transposed, grouped", (4, 3, 3, 3), NeuronLayout(2, axis=1), False),
)
OPTIMIZERS: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
)
