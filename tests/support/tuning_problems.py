"""Problems to tune for, and choices."""

from __future__ import annotations

import torch

from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy

CONV = Problem(
    (2, 8, 6, 6),
    (16, 8, 3, 3),
    ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    False,
    torch.float32,
)
LINEAR = Problem((32, 8), (16, 8), None, False, torch.float32)
CUSTOM, PACK = KernelChoice(Strategy.CUSTOM), KernelChoice(Strategy.PACK)
