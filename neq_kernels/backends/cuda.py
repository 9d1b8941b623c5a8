"""CUDA C++ kernels: custom products where few rows are active, packing in front of PyTorch's.

The tests execute them thread by thread on the CPU and compile them with nvcc; they have not run on
a GPU yet, so one is given to them by default only where ``neq doctor`` found them right (see
``dispatch.verified_backends``).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends.aten import count_write
from neq_kernels.backends.gpu_base import DTYPES, Gpu, WeightGrads, count_of, tables
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.channels import Active, NeuronLayout

LIBRARY = Path(__file__).parent.parent / "_cuda.so"
_LEAST_CAPABILITY = (7, 5)
# Rows of a matrix start at multiples of so many bytes; rows and pixels are numbered in 31 bits.
_ALIGNMENT, _MOST_PIXELS = 16, 2**31

_leaf = torch.ops.neq_kernels_cuda


class Cuda(Gpu):
    """The kernels of ``csrc/cuda``."""

    name = "cuda"

    def unavailable(self) -> str | None:
        return _load()

    def build(self) -> str:
        """A digest of the library's bytes; empty where there is none."""
        return hashlib.sha256(LIBRARY.read_bytes()).hexdigest() if LIBRARY.exists() else ""

    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        usable = super().strategies(problem)
        return (*usable, Strategy.CUSTOM) if _has_kernel(problem) else usable

    def linear_wgrad(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        active: Active,
        with_bias: bool,
        settings: tuple[int, ...],
    ) -> WeightGrads:
        order, count, n = active.order, active.count, active.n
        dy, x, like = _rows(grad_output), _rows(input), weight.contiguous()
        grads = _leaf.linear_wgrad(dy, x, like, order, count, n, with_bias)
        return grads[0], grads[1] if with_bias else None

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
        numbers = (geometry.stride, geometry.padding, geometry.dilation)
        if Problem.conv(input, weight, geometry).is_depthwise:
            wgrad, dy, x = _leaf.depthwise_wgrad, grad_output, input
        else:
            wgrad, dy, x = _leaf.conv_wgrad, _images(grad_output), _images(input)
        grads = wgrad(dy, x, weight, *numbers, order, count, n, with_bias)
        return grads[0], grads[1] if with_bias else None

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
        row = t.shape[dim] * t.element_size()
        is_ours = n > 0 and t.numel() > 0 and inside.is_contiguous() and t.dtype in DTYPES
        if not is_ours or row % _ALIGNMENT or t.data_ptr() % _ALIGNMENT:
            return super().pack(t, order, n, dim), None
        matrix, count = inside.reshape(-1, t.shape[dim]), count_of(n, t.device)
        is_matrix = t.dim() == 2
        packed, sums = _leaf.pack(matrix, order, count, n, is_matrix, summed)
        if is_matrix:
            packed = packed[:, : len(matrix)].t()
        else:
            packed = packed[:, :n].view(*inside.shape[:-1], n).movedim(-1, dim)
        return packed, sums.sum(0) if summed else None

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor:
        simple = layout == NeuronLayout() and layout.blocks(like) is not None and like.numel() > 0
        size = math.prod(like.shape[1:])
        simple = simple and size % 4 == 0 and n > 0 and rows.stride() == like.stride()
        if not simple or rows.dtype not in (torch.float32, like.dtype) or like.dtype not in DTYPES:
            return super().scatter_rows(rows, like, order, n, layout)
        out: Tensor = _leaf.scatter_rows(rows, like, order, count_of(n, rows.device))
        return out

    def sgd_rows_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        steps: Sequence[Tensor],
        orders: Sequence[Tensor],
        n: Sequence[int],
        blocks: Sequence[int],
        **settings: Any,
    ) -> None:
        lists = (params, grads, momentum_buffers, steps, orders)
        number, addresses, shapes = tables(lists, n, blocks)
        if number == 0:
            return
        _leaf.sgd_rows_(
            *(params[0], addresses, shapes, len(n), number),
            *(settings[name] for name in ("lr", "momentum", "dampening", "weight_decay")),
            *(len(momentum_buffers) > 0, settings["nesterov"], settings["maximize"]),
        )
        count_write(params, momentum_buffers, steps)

    def adam_rows_(
        self,
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
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders)
        number, addresses, shapes = tables(lists, n, blocks)
        if number == 0:
            return
        _leaf.adam_rows_(
            *(params[0], addresses, shapes, len(n), number),
            *(settings[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
            *(len(max_exp_avg_sqs) > 0, settings["decoupled"], settings["maximize"]),
        )
        count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


@functools.cache
def _load() -> str | None:
    """Load the library; returns the reason if its kernels cannot run."""
    if not LIBRARY.exists():
        return "the CUDA extension was not built when neq_kernels was installed"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        needed, got = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        return f"expected a GPU of compute capability {needed} or newer, got {got}"
    return load_library(LIBRARY)


def load_library(path: Path | str) -> str | None:
    """Load one build of the kernels; returns the reason if it cannot be used."""
    try:
        torch.ops.load_library(str(path))
        _leaf.multiprocessors()
    except (OSError, RuntimeError) as error:  # a file, or a driver, that does not fit
        return f"the CUDA extension cannot be used: {error}"
    return None


def _has_kernel(problem: Problem) -> bool:
    if problem.dtype not in DTYPES or problem.output_positions >= _MOST_PIXELS:
        return False
    if problem.is_depthwise:
        return True
    sizes = problem.neurons, problem.weight_size[1]
    if any(size * problem.dtype.itemsize % _ALIGNMENT for size in sizes):
        return False
    if problem.geometry is None:
        return True
    return problem.is_plain_conv2d and problem.channels_last


def _rows(matrix: Tensor) -> Tensor:
    """Columns lie side by side, and every row starts at a multiple of 16 bytes."""
    if matrix.stride(1) != 1 or matrix.stride(0) * matrix.element_size() % _ALIGNMENT:
        matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % _ALIGNMENT else matrix


def _images(images: Tensor) -> Tensor:
    """channels_last, every pixel at a multiple of 16 bytes."""
    images = images.contiguous(memory_format=torch.channels_last)
    return images.clone() if images.data_ptr() % _ALIGNMENT else images
