"""Triton kernels for GPUs: custom products where few rows are active, packing in front of
PyTorch's, steps of optimizers.

The tests compile and execute them without a GPU; they have not run on one yet, so one is given to
them by default only where ``neq doctor`` found them right (see ``dispatch.verified_backends``).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends.gpu_base import DTYPES, Gpu, WeightGrads, count_of
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.backends.triton.tiles import (
    Tiles,
    architecture,
    can_describe,
    choices,
    precision,
)
from neq_kernels.channels import Active, NeuronLayout

_LEAST_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16


class Triton(Gpu):
    """The kernels beside this file; Triton itself is imported when the first one runs."""

    name = "triton"

    def unavailable(self) -> str | None:
        return _unavailable()

    def build(self) -> str:
        """Triton's version; empty where the kernels cannot run."""
        return _version() if self.unavailable() is None else ""

    def built_with(self) -> dict[str, str]:
        return {"triton": _version()}

    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        usable = super().strategies(problem)
        g = problem.geometry
        is_conv2d = g is not None and len(problem.weight_size) == 4 and not g.transposed
        if problem.dtype in DTYPES and (g is None or is_conv2d):
            return *usable, Strategy.CUSTOM
        return usable

    def settings(self, problem: Problem, n: int) -> tuple[tuple[int, ...], ...]:
        if problem.is_depthwise:
            return ((),)
        g, c = problem.geometry, problem.weight_size[1]
        arch = architecture(torch.device(self.device_type))
        how = precision("matmul" if g is None else "conv", problem.dtype, arch)
        is_matrix = g is None or (problem.channels_last and _is_product(problem.weight_size, g))
        found = choices(
            n if g is None else min(n, problem.neurons // g.groups),
            c,
            problem.dtype,
            how,
            arch,
            scattered=not (is_matrix or problem.channels_last),
            described=is_matrix and can_describe(c, problem.dtype),
        )
        return tuple(tiles.settings for tiles in found)

    def linear_wgrad(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        active: Active,
        with_bias: bool,
        settings: tuple[int, ...],
    ) -> WeightGrads:
        from neq_kernels.backends.triton.linear_wgrad import linear_wgrad

        order, count, n = active.order, active.count, active.n
        tiles = Tiles.of(settings) if settings else None
        return linear_wgrad(grad_output, input, weight, order, count, n, with_bias, tiles=tiles)

    def conv_wgrad(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: ConvGeometry,
        active: Active,
        with_bias: bool,
        settings: tuple[int, ...],
    ) -> WeightGrads:
        order, count, n = active.order, active.count, active.n
        arguments = (grad_output, input, weight, geometry, order, count, n, with_bias)
        if Problem.conv(input, weight, geometry).is_depthwise:
            from neq_kernels.backends.triton.depthwise_wgrad import depthwise_wgrad

            return depthwise_wgrad(*arguments)
        from neq_kernels.backends.triton.conv_wgrad import conv_wgrad

        return conv_wgrad(*arguments, tiles=Tiles.of(settings) if settings else None)

    def pack(self, t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
        """As that of ``aten``. Of a matrix, the result's rows lie innermost, as a product that sums
        over them reads it."""
        return self._pack(t, order, n, dim, summed=False)[0]

    def pack_and_sum(
        self, t: Tensor, order: Tensor, n: int, dim: int
    ) -> tuple[Tensor, Tensor | None]:
        return self._pack(t, order, n, dim, summed=True)

    def _pack(
        self, t: Tensor, order: Tensor, n: int, dim: int, *, summed: bool
    ) -> tuple[Tensor, Tensor | None]:
        inside = t if dim == t.dim() - 1 else t.movedim(dim, -1)
        if n == 0 or t.numel() == 0 or not inside.is_contiguous() or t.dtype not in DTYPES:
            return super().pack(t, order, n, dim), None
        from neq_kernels.backends.triton.pack import gather

        matrix, count = inside.reshape(-1, t.shape[dim]), count_of(n, t.device)
        is_matrix = t.dim() == 2
        packed, sums = gather(matrix, order, count, n, transposed=is_matrix, summed=summed)
        if is_matrix:
            return packed, sums
        return packed.view(*inside.shape[:-1], n).movedim(-1, dim), sums

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor:
        simple = layout == NeuronLayout() and layout.blocks(like) is not None and like.numel() > 0
        if not simple or rows.stride()[1:] != like.stride()[1:] or rows.dtype not in DTYPES:
            return super().scatter_rows(rows, like, order, n, layout)
        from neq_kernels.backends.triton.pack import scatter

        out = torch.empty_like(like)
        scatter(rows, out, order, count_of(n, rows.device))
        return out

    def sgd_rows_(self, *tensors: Sequence[Any], **settings: Any) -> None:
        from neq_kernels.backends.triton import row_steps

        row_steps.sgd_rows_(*tensors, **settings)

    def adam_rows_(self, *tensors: Sequence[Any], **settings: Any) -> None:
        from neq_kernels.backends.triton import row_steps

        row_steps.adam_rows_(*tensors, **settings)


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        needed, got = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        return f"expected a GPU of compute capability {needed} or newer, got {got}"
    return None


def _version() -> str:
    import triton

    found: str = triton.__version__
    return found


def _is_product(weight_size: Sequence[int], g: ConvGeometry) -> bool:
    """Whether a convolution is a plain product of its pixels."""
    is_unit = math.prod(weight_size[2:]) == max(g.stride) == g.groups == 1
    return is_unit and max(g.padding) == 0
