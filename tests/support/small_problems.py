"""Weight gradients that take no time, for the benchmarks of kernels."""

from __future__ import annotations

import torch

from benchmarks.kernels.layer_shapes import Shape
from neq_kernels.backends.problem import ConvGeometry, Problem

CONV = Problem(
    (2, 8, 6, 6),
    (12, 8, 3, 3),
    ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    True,
    torch.float32,
)
LINEAR = Problem((40, 8), (12, 8), None, False, torch.float32)
SHAPE = Shape("net", "conv", CONV)
