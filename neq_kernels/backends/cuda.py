"""CUDA C++ kernels: own products where few rows are active, packing in front of the library's.

Executed thread by thread on the CPU by the tests and compiled by nvcc; not yet run on a GPU, so
they serve one by themselves where ``neq doctor`` found them right (see ``proofs``).
``NEQ_KERNELS_CUDA_LIBRARY`` names another build to load: the emulator's serves CPU tensors.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends import aten, gpu
from neq_kernels.channels import NeuronLayout
from neq_kernels.problem import ConvGeometry, Problem, Strategy

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_CUDA_LIBRARY"
LIBRARY = Path(__file__).parent.parent / "_cuda.so"
_LEAST_CAPABILITY = (7, 5)
# Rows of a matrix start at multiples of so many bytes; rows and pixels are numbered in 31 bits.
_ALIGNMENT, _MOST_PIXELS = 16, 2**31

_leaf = torch.ops.neq_kernels_cuda


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can run, else why they cannot."""
    library = os.environ.get(ENVIRONMENT_VARIABLE)
    if library is None:
        if not LIBRARY.exists():
            return "the CUDA extension was not built when neq_kernels was installed"
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "PyTorch finds no NVIDIA GPU"
        capability = torch.cuda.get_device_capability()
        if capability < _LEAST_CAPABILITY:
            needed, got = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
            return f"expected a GPU of compute capability {needed} or newer, got {got}"
    try:
        torch.ops.load_library(library or str(LIBRARY))
        _leaf.multiprocessors()
    except (OSError, RuntimeError) as error:  # a file, or a driver, that does not fit
        return f"the CUDA extension cannot be used: {error}"
    return None


def emulated() -> bool:
    """Whether kernels are those of the emulator, which serves CPU tensors."""
    return os.environ.get(ENVIRONMENT_VARIABLE) is not None


def serves(device_type: str) -> bool:
    """Whether tensors of this device type can be given to the kernels."""
    return (device_type == "cpu") == emulated()


def strategies(problem: Problem) -> tuple[Strategy, ...]:
    """The strategies that can serve."""
    usable = aten.strategies(problem)
    return (*usable, Strategy.FUSED) if _serves(problem) else usable


def _serves(problem: Problem) -> bool:
    if problem.dtype not in gpu.DTYPES or problem.output_positions >= _MOST_PIXELS:
        return False
    if problem.is_depthwise:
        return True
    sizes = problem.neurons, problem.weight_size[1]
    if any(size * problem.dtype.itemsize % _ALIGNMENT for size in sizes):
        return False
    if problem.geometry is None:
        return True
    return problem.is_plain_conv2d and problem.channels_last


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
) -> aten.Grads:
    """``aten.linear_backward``; by the own kernel where the strategy is ``FUSED``.

    Args:
        count: int32[1] on the device, for the own kernel to read n from; None makes one.
    """

    def own(dy: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        like = weight.contiguous()
        grads = _leaf.linear_wgrad(_rows(dy), _rows(x), like, order, count, n, wanted[2])
        return grads[0], grads[1] if wanted[2] else None

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
) -> aten.Grads:
    """``aten.conv_backward``; by the own kernels where the strategy is ``FUSED``.

    Args:
        count: as for :func:`linear_backward`.
    """

    def own(dy: Tensor, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        like = weight if geometry.layout.blocks(weight) is not None else weight.contiguous()
        numbers = (geometry.stride, geometry.padding, geometry.dilation)
        if Problem.conv(x, weight, geometry).is_depthwise:
            wgrad = _leaf.depthwise_wgrad
        else:
            wgrad, dy, x = _leaf.conv_wgrad, _images(dy), _images(x)
        grads = wgrad(dy, x, like, *numbers, order, count, n, wanted[2])
        return grads[0], grads[1] if wanted[2] else None

    return gpu.conv_backward(
        *(grad_output, input, weight, geometry, order, n, wanted, strategy, count),
        _PRIMITIVES,
        own,
    )


def _rows(matrix: Tensor) -> Tensor:
    """Columns lie side by side, and every row starts at a multiple of 16 bytes."""
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.element_size() % _ALIGNMENT:
        matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % _ALIGNMENT else matrix


def _images(images: Tensor) -> Tensor:
    """channels_last, every pixel at a multiple of 16 bytes."""
    images = images.contiguous(memory_format=torch.channels_last)
    return images.clone() if images.data_ptr() % _ALIGNMENT else images


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
    row = t.shape[dim] * t.element_size()
    is_ours = n > 0 and t.numel() > 0 and inside.is_contiguous() and t.dtype in gpu.DTYPES
    if not is_ours or row % _ALIGNMENT or t.data_ptr() % _ALIGNMENT:
        return aten.pack(t, order, n, dim), None
    matrix, count = inside.reshape(-1, t.shape[dim]), gpu.count_of(n, t.device)
    is_matrix = t.dim() == 2
    packed, sums = _leaf.pack(matrix, order, count, n, is_matrix, summed)
    if is_matrix:
        packed = packed[:, : len(matrix)].t()
    else:
        packed = packed[:, :n].view(*inside.shape[:-1], n).movedim(-1, dim)
    return packed, sums.sum(0) if summed else None


def scatter_rows(rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout) -> Tensor:
    """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0."""
    simple = layout == NeuronLayout() and layout.blocks(like) is not None and like.numel() > 0
    size = math.prod(like.shape[1:])
    simple = simple and size % 4 == 0 and n > 0 and rows.stride() == like.stride()
    if not simple or rows.dtype not in (torch.float32, like.dtype) or like.dtype not in gpu.DTYPES:
        return aten.scatter_rows(rows, like, order, n, layout)
    out: Tensor = _leaf.scatter_rows(rows, like, order, gpu.count_of(n, rows.device))
    return out


channel_similarity = aten.channel_similarity


def steps_rows(parameter: Tensor, layout: NeuronLayout) -> bool:
    """Whether the row steps serve this parameter; gradient and state have to lie as it does."""
    return gpu.steps_rows(parameter, layout, "cpu" if emulated() else "cuda")


def sgd_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    orders: Sequence[Tensor],
    n: Sequence[int],
    blocks: Sequence[int],
    **settings: Any,
) -> None:
    """``cpu.sgd_rows_``, of parameters on one device; arguments are not checked."""
    lists = (params, grads, momentum_buffers, steps, orders)
    number, addresses, shapes = gpu.tables(lists, n, blocks)
    if number == 0:
        return
    _leaf.sgd_rows_(
        *(params[0], addresses, shapes, len(n), number),
        *(settings[name] for name in ("lr", "momentum", "dampening", "weight_decay")),
        *(len(momentum_buffers) > 0, settings["nesterov"], settings["maximize"]),
    )
    aten.count_write(params, momentum_buffers, steps)


def adam_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    orders: Sequence[Tensor],
    n: Sequence[int],
    blocks: Sequence[int],
    **settings: Any,
) -> None:
    """``cpu.adam_rows_``, of parameters on one device; arguments are not checked."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders)
    number, addresses, shapes = gpu.tables(lists, n, blocks)
    if number == 0:
        return
    _leaf.adam_rows_(
        *(params[0], addresses, shapes, len(n), number),
        *(settings[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *(len(max_exp_avg_sqs) > 0, settings["decoupled"], settings["maximize"]),
    )
    aten.count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


_PRIMITIVES = sys.modules[__name__]
