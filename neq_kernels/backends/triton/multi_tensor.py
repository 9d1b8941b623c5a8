"""One launch over the active neurons of many parameters: how a program finds its own.

A kernel takes two tables: the addresses of each parameter's tensors, and how its neurons lie in
memory. Every neuron belongs to one program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends import gpu_base

_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Elements of a step of a program along one neuron. Across neurons it is another number: tiles of
# one shape would get one layout, and neurons that are not read in pieces would be read with gaps.
_STRETCH = 1024
_SHAPE = tl.constexpr(6)


@triton.jit
def neurons_of_program(shapes, parameters):
    """Its parameter, the first of its neurons and their number, and how they lie in memory."""
    program = tl.program_id(0)
    parameter, end = 0, parameters
    while end - parameter > 1:
        middle = (parameter + end) // 2
        is_later = tl.load(shapes + middle * _SHAPE + 5) > program
        parameter = tl.where(is_later, parameter, middle)
        end = tl.where(is_later, middle, end)
    shape = shapes + parameter * _SHAPE
    n = tl.load(shape).to(tl.int32)
    outer = tl.load(shape + 1).to(tl.int32)
    per_group = tl.load(shape + 2).to(tl.int32)
    inner = tl.load(shape + 3).to(tl.int32)
    at_most = tl.load(shape + 4).to(tl.int32)
    start = (program - tl.load(shape + 5).to(tl.int32)) * at_most
    return parameter, start, tl.minimum(at_most, n - start), outer, per_group, inner


@triton.jit
def is_stretch(addresses, count, outer, inner):
    """Whether there is one neuron, and it can be read in pieces of 16 bytes or 16 elements."""
    return (count == 1) & (outer == 1) & (inner % 16 == 0) & (addresses % 16 == 0)


@triton.jit
def places(at, order, count, outer, per_group, inner, BLOCK: tl.constexpr):
    """Neurons, offsets in memory and existence of the elements from ``at`` on. Neighbours here are
    neighbours in memory: of one neuron, then of the next, then of the next outer index."""
    element = at + tl.arange(0, BLOCK)
    exists = element < outer * count * inner
    block = element // inner
    neurons = tl.load(order + block % count, mask=exists, other=0)
    neuron = neurons.to(tl.int32)
    row = (neuron // per_group).to(tl.int64) * outer + block // count
    offsets = (row * per_group + neuron % per_group) * inner + element % inner
    return neurons, offsets, exists


@triton.jit
def pointer(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    typed = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def advance(steps, order, count, BLOCK: tl.constexpr):
    """Count a step of every neuron of this program."""
    tl.debug_barrier()  # other threads may still have to read the old counts
    i = tl.arange(0, BLOCK)
    neurons = tl.load(order + i, mask=i < count, other=0)
    before = tl.load(steps + neurons, mask=i < count, other=0)
    tl.store(steps + neurons, before + 1, mask=i < count)


def launch(
    kernel: Any,
    tensors: Sequence[Sequence[Tensor]],
    n: Sequence[int],
    blocks: Sequence[int],
    *numbers: float,
    **flags: bool,
) -> None:
    """One launch for all parameters. An empty list of ``tensors`` stands for addresses of 0."""
    first = tensors[0][0]
    programs, addresses, shapes = gpu_base.tables(tensors, n, blocks)
    if programs == 0:
        return
    on_gpu = first.device.type == "cuda"
    with torch.cuda.device(first.device) if on_gpu else contextlib.nullcontext():
        kernel[(programs,)](
            addresses,
            shapes,
            len(n),
            *map(float, numbers),
            ELEMENT=_ELEMENTS[first.dtype],
            **flags,
            STRETCH=_STRETCH,
            ACROSS=gpu_base.ELEMENTS_ACROSS,
        )
