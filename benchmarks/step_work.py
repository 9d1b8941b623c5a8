"""What one dense training step has to do: products of matrices, and bytes that other operations
move. Counted with tensors that have shapes and no memory (``meta``).

What is no product is taken to read each of its operands and to write each of its results once, as
eager PyTorch does, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import Case, Layout
from benchmarks.matmul_predictor import Gemm
from neq_kernels.measure import flops
from neq_kernels.measure.problems import problems_of
from neq_kernels.measure.recorder import Call, Recorder
from neq_kernels.problem import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = 2

aten = torch.ops.aten
# Counted layer by layer.
_PRODUCTS = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm}
# Neither read nor write anything.
_FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty}
# A batch has to be read whole for its statistics before it can be read to be normalised.
_STATISTICS = {aten.native_batch_norm, aten.native_batch_norm_backward}


@dataclass(frozen=True)
class Product:
    """A product and what its operands take in memory, which for a convolution is less than the
    matrices of the product would."""

    gemm: Gemm
    operand_bytes: float

    @property
    def matrix_bytes(self) -> int:
        return BYTES * (self.gemm.m + self.gemm.n) * self.gemm.k


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution, and whether backprop computes its input gradient."""

    name: str
    problem: Problem
    has_dgrad: bool

    @property
    def input_bytes(self) -> int:
        return BYTES * math.prod(self.problem.input_size)

    @property
    def output_bytes(self) -> int:
        return BYTES * self.problem.output_positions * self.problem.neurons

    @property
    def weight_bytes(self) -> int:
        return BYTES * math.prod(self.problem.weight_size)

    @property
    def macs(self) -> int:
        p = self.problem
        return p.output_positions * p.row_size * p.neurons

    @property
    def is_grouped(self) -> bool:
        return self.problem.geometry is not None and self.problem.geometry.groups > 1

    @property
    def channels_inside(self) -> bool:
        """Whether the channels of one position are neighbours in memory."""
        return self.problem.geometry is None or self.problem.channels_last

    def forward(self) -> Product:
        p = self.problem
        gemm = Gemm(p.output_positions, p.neurons, p.row_size)
        return Product(gemm, self.input_bytes + self.weight_bytes)

    def dgrad(self) -> Product:
        """Of a strided convolution each input position meets only a part of the taps."""
        channels = self.problem.input_size[1]
        positions = math.prod(self.problem.input_size) // channels
        gemm = Gemm(positions, channels, max(1, -(-self.macs // (positions * channels))))
        return Product(gemm, self.output_bytes + self.weight_bytes)

    def wgrad(self, rows: int, grad_output_bytes: float, kernels: str = "GENERIC") -> Product:
        p = self.problem
        gemm = Gemm(rows, p.row_size, p.output_positions, kernels)
        return Product(gemm, self.input_bytes + grad_output_bytes)


class Attention(NamedTuple):
    """Attention in one fused kernel: FLOPs of one of its products, of which the forward makes two
    and the backward, which computes the scores again, five; bytes of queries, keys, values and
    outputs together, which the forward moves once and the backward with their gradients."""

    product_flops: int
    bytes: int


@dataclass(frozen=True)
class StepWork:
    """One dense step.

    Attributes:
        layers: in the order of their first call.
        forward_bytes: moved by all other operations of the forward, loss included.
        backward_bytes: the same of the backward.
        attention: of each layer that has one.
        parameters: how many numbers the optimizer updates.
    """

    layers: tuple[Layer, ...]
    forward_bytes: int
    backward_bytes: int
    attention: tuple[Attention, ...]
    parameters: int


def meta_model(case: Case, layout: Layout, dtype: str) -> tuple[nn.Module, Tensor]:
    """A model of a case and a batch of inputs, without memory.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    model = case.model(layout).to(device="meta", dtype=DTYPES[dtype])
    x = torch.empty(case.images, *case.shape, dtype=DTYPES[dtype], device="meta")
    return model, x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x


def step_work(model: nn.Module, x: Tensor) -> StepWork:
    """Count one step of classification.

    Args:
        model: plain, on ``meta``.
        x: a batch on ``meta``.

    Raises:
        ValueError: a transposed convolution, or one whose padding is not given in numbers.
    """
    counted = flops.count(model, x[:1])
    problems = problems_of(model, x)
    calls: dict[str, list[Call]] = {}
    labels = torch.empty(len(x), dtype=torch.long, device="meta")
    attention: list[Attention] = []

    def note(call: Call, *_: Any) -> None:
        calls.setdefault(call.name, []).append(call)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _fused(attention)))
        moved = stack.enter_context(_Moved())
        with Recorder(model, on_call=note).watching():
            loss = F.cross_entropy(model(x), labels)
        forward = moved.bytes
        loss.backward()
    model.zero_grad(set_to_none=True)
    layers = []
    for row in counted.layers:
        if row.kind == "norm":
            continue
        problem = problems.get(row.name) or _projection(row.name, calls[row.name], x.dtype)
        layers.append(Layer(row.name, problem, row.dgrad_macs > 0))
    return StepWork(
        layers=tuple(layers),
        forward_bytes=forward,
        backward_bytes=moved.bytes - forward,
        attention=tuple(attention),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _projection(name: str, calls: list[Call], dtype: torch.dtype) -> Problem:
    """Of ``nn.MultiheadAttention``, which makes one product of its calls with parts of a weight."""
    weight = calls[0].weight
    if calls[0].kind != "linear" or weight is None:
        raise ValueError(f"{name}: expected a convolution with its padding in numbers, not such")
    rows = sum(call.macs for call in calls) // weight.numel()
    return Problem((rows, weight.shape[1]), tuple(weight.shape), None, False, dtype)


class _Moved(TorchDispatchMode):
    """Adds up the bytes that operations other than products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet not in _PRODUCTS and packet not in _FREE and not _is_view(func):
            times = 2 if packet in _STATISTICS else 1
            self.bytes += times * _size((args, kwargs)) + _size(result)
        return result


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _fused(found: list[Attention]) -> Callable[..., Tensor]:
    """In place of ``F.scaled_dot_product_attention``, which would write the whole matrix of scores
    on ``meta`` and does not on a GPU."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        output: Tensor = _FusedAttention.apply(q, k, v, found)
        return output

    return attention


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: list[Attention]) -> Tensor:
        scores = q.shape[:-1].numel() * k.shape[-2]
        found.append(Attention(2 * scores * q.shape[-1], _size((q, k, v)) + _size(q)))
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = (torch.empty_like(t) for t in ctx.saved_tensors)
        return q, k, v, None


def occupied(layer: Layer, n: int) -> float:
    """Share of dY's bytes that have to be read for ``n`` of its channels, chosen at random: a GPU
    reads 32 bytes at least."""
    k = layer.problem.neurons
    together = min(k, 32 // BYTES) if layer.channels_inside else 1
    return 1 - math.comb(k - together, n) / math.comb(k, n)
