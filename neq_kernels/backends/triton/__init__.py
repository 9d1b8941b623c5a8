"""Triton kernels for GPUs: own products where few rows are active, gathers for the library's, steps
of optimizers.

Compiled and executed without a GPU by the tests; not yet run on one, so they serve it by themselves
where ``neq doctor`` found them right (see ``proofs``).
With ``TRITON_INTERPRET=1`` they serve CPU tensors, by Triton's own interpreter, very slowly.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends import aten, gpu
from neq_kernels.backends.triton.tiles import (
    Tiles,
    architecture,
    can_describe,
    choices,
    precision,
)
from neq_kernels.channels import NeuronLayout
from neq_kernels.problem import ConvGeometry, Problem, Strategy

_LEAST_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can run, else why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        needed, got = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        return f"expected a GPU of compute capability {needed} or newer, got {got}"
    return None


def interpreted() -> bool:
    """Whether Triton was told to interpret the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device_type: str) -> bool:
    """Whether tensors of this device type can be given to the kernels."""
    return device_type != "cpu" or interpreted()


def strategies(problem: Problem) -> tuple[Strategy, ...]:
    """The strategies that can serve."""
    usable = aten.strategies(problem)
    g = problem.geometry
    is_conv2d = g is not None and len(problem.weight_size) == 4 and not g.transposed
    if problem.dtype in gpu.DTYPES and (g is None or is_conv2d):
        return *usable, Strategy.FUSED
    return usable


def version() -> str:
    """Of Triton."""
    import triton

    found: str = triton.__version__
    return found


def settings(problem: Problem, n: int) -> tuple[tuple[int, ...], ...]:
    """The ways of running the own kernel for n active channels that are worth a measurement, the
    one that goes by rule first."""
    if problem.is_depthwise:
        return ((),)
    g, c = problem.geometry, problem.weight_size[1]
    arch = architecture(torch.device("cpu" if interpreted() else "cuda"))
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


def _is_product(weight_size: Sequence[int], g: ConvGeometry) -> bool:
    """Whether a convolution is a plain product of its pixels."""
    is_unit = math.prod(weight_size[2:]) == max(g.stride) == g.groups == 1
    return is_unit and max(g.padding) == 0


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    n: int,
    start: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    *,
    count: Tensor | None = None,
    settings: tuple[int, ...] = (),
) -> aten.Grads:
    """``aten.linear_backward``; by the own kernel where the strategy is ``FUSED``.

    Args:
        count: int32[1] on the device, for the own kernel to read n from; None makes one.
        settings: of the own kernel, one of those that :func:`settings` lists; empty: by rule.
    """

    def own(dy: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        from neq_kernels.backends.triton.linear_wgrad import linear_wgrad

        tiles = Tiles.of(settings) if settings else None
        return linear_wgrad(dy, x, weight, order, count, n, wanted[2], tiles=tiles)

    return gpu.linear_backward(
        *(grad_output, input, input_size, weight, order, n, start, wanted, strategy, count),
        _PRIMITIVES,
        own,
    )


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    *,
    count: Tensor | None = None,
    settings: tuple[int, ...] = (),
) -> aten.Grads:
    """``aten.conv_backward``; by the own kernels where the strategy is ``FUSED``.

    Args:
        count, settings: as for :func:`linear_backward`.
    """

    def own(dy: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        like = weight if geometry.layout.blocks(weight) is not None else weight.contiguous()
        arguments = (dy, x, like, geometry, order, count, n, wanted[2])
        if Problem.conv(x, weight, geometry).is_depthwise:
            from neq_kernels.backends.triton.depthwise_wgrad import depthwise_wgrad

            return depthwise_wgrad(*arguments)
        from neq_kernels.backends.triton.conv_wgrad import conv_wgrad

        return conv_wgrad(*arguments, tiles=Tiles.of(settings) if settings else None)

    return gpu.conv_backward(
        *(grad_output, input, weight, geometry, order, n, wanted, strategy, count),
        _PRIMITIVES,
        own,
    )


def pack(t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
    """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format. Of a matrix, the
    result's rows lie innermost, as a product that sums over them reads it."""
    return _pack(t, order, n, dim, summed=False)[0]


def pack_and_sum(t: Tensor, order: Tensor, n: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """``pack``, and each channel's float32 sum; None where the own kernel does not serve."""
    return _pack(t, order, n, dim, summed=True)


def _pack(
    t: Tensor, order: Tensor, n: int, dim: int, *, summed: bool
) -> tuple[Tensor, Tensor | None]:
    inside = t if dim == t.dim() - 1 else t.movedim(dim, -1)
    if n == 0 or t.numel() == 0 or not inside.is_contiguous() or t.dtype not in gpu.DTYPES:
        return aten.pack(t, order, n, dim), None
    from neq_kernels.backends.triton.gather import gather

    matrix, count = inside.reshape(-1, t.shape[dim]), gpu.count_of(n, t.device)
    is_matrix = t.dim() == 2
    packed, sums = gather(matrix, order, count, n, transposed=is_matrix, summed=summed)
    if is_matrix:
        return packed, sums
    return packed.view(*inside.shape[:-1], n).movedim(-1, dim), sums


def scatter_rows(rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout) -> Tensor:
    """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0."""
    simple = layout == NeuronLayout() and layout.blocks(like) is not None and like.numel() > 0
    if not simple or rows.stride()[1:] != like.stride()[1:] or rows.dtype not in gpu.DTYPES:
        return aten.scatter_rows(rows, like, order, n, layout)
    from neq_kernels.backends.triton.gather import scatter

    out = torch.empty_like(like)
    scatter(rows, out, order, gpu.count_of(n, rows.device))
    return out


channel_similarity = aten.channel_similarity


def steps_rows(parameter: Tensor, layout: NeuronLayout) -> bool:
    """Whether the row steps serve this parameter; gradient and state have to lie as it does."""
    return gpu.steps_rows(parameter, layout, "cpu" if interpreted() else "cuda")


def sgd_rows_(*tensors: Sequence[Any], **settings: Any) -> None:
    """``cpu.sgd_rows_``, of parameters on one device; arguments are not checked."""
    from neq_kernels.backends.triton import row_steps

    row_steps.sgd_rows_(*tensors, **settings)


def adam_rows_(*tensors: Sequence[Any], **settings: Any) -> None:
    """``cpu.adam_rows_``, of parameters on one device; arguments are not checked."""
    from neq_kernels.backends.triton import row_steps

    row_steps.adam_rows_(*tensors, **settings)


_PRIMITIVES = sys.modules[__name__]
