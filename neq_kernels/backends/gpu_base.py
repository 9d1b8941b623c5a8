"""What the backends for GPUs have in common: the library's part of a backward, and who does what of
the rest."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neq_kernels.backends import aten
from neq_kernels.backends.problem import ConvGeometry, Strategy
from neq_kernels.channels import NeuronLayout

# Of grad_output, input, count: the gradients of weight and bias.
OwnWgrad = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Elements of a step of a block that works across neurons.
ELEMENTS_ACROSS = 512
# Where neurons lie side by side: what a block has of them fills the sectors that it touches.
_LEAST_NEIGHBOURS = 8
_MOST_WEIGHTS_OF_A_NEURON = 2**27  # what a block has is numbered in 32 bits


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
    count: Tensor | None,
    primitives: aten.Primitives,
    own_wgrad: OwnWgrad,
) -> aten.Grads:
    """``aten.linear_backward``; the weight's gradient by ``own_wgrad``, of matrices, where the
    strategy is ``CUSTOM``.

    Args:
        count: int32[1] on the device, for the own kernel to read n from; None makes one.
    """
    fused = strategy == Strategy.CUSTOM and wanted[1] and n > 0
    fused = fused and grad_output.numel() > 0 and weight.numel() > 0
    grads = aten.linear_backward(
        grad_output,
        input,
        input_size,
        weight,
        order,
        n,
        start,
        (wanted[0], False, False) if fused else wanted,
        Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
        primitives,
    )
    if not fused:
        return grads
    assert input is not None
    dy = grad_output.reshape(-1, len(order))
    x = input.reshape(len(dy), -1)
    return grads[0], *own_wgrad(dy, x, count_of(n, weight.device) if count is None else count)


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    count: Tensor | None,
    primitives: aten.Primitives,
    own_wgrad: OwnWgrad,
) -> aten.Grads:
    """``aten.conv_backward``; as :func:`linear_backward`."""
    fused = strategy == Strategy.CUSTOM and wanted[1] and n > 0
    fused = fused and grad_output.numel() > 0 and weight.numel() > 0
    grads = aten.conv_backward(
        grad_output,
        input,
        weight,
        geometry,
        order,
        n,
        (wanted[0], False, False) if fused else wanted,
        Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
        primitives,
    )
    if not fused:
        return grads
    count = count_of(n, weight.device) if count is None else count
    return grads[0], *own_wgrad(grad_output, input, count)


@functools.lru_cache(maxsize=8192)
def count_of(n: int, device: torch.device) -> Tensor:
    """int32[1] on the device: n."""
    with torch.inference_mode(False):
        return torch.tensor([n], dtype=torch.int32, device=device)


# --- row steps of many parameters ----------------------------------------------------------------


def steps_rows(parameter: Tensor, layout: NeuronLayout, device_type: str) -> bool:
    """Whether one launch can step this parameter with others, on devices of this type; gradient and
    state have to lie as it does."""
    blocks = layout.blocks(parameter)
    return (
        parameter.device.type == device_type
        and parameter.dtype in DTYPES
        and blocks is not None
        and blocks[1] * blocks[3] < _MOST_WEIGHTS_OF_A_NEURON
    )


def tables(
    tensors: Sequence[Sequence[Tensor]], n: Sequence[int], blocks: Sequence[int]
) -> tuple[int, Tensor, Tensor]:
    """What one launch for many parameters is told, on their device.

    Args:
        tensors: lists of one tensor for each parameter; an empty one stands for addresses of 0.
        n: active neurons of each parameter.
        blocks: four numbers of each parameter, see ``NeuronLayout.blocks``.

    Returns:
        the number of blocks of threads; int64[parameters, lists] of addresses; and
        int64[parameters, 6] of the number of active neurons, three of the parameter's blocks, how
        many neurons a block of threads takes, and the first one that does.
    """
    device = tensors[0][0].device
    number, shapes = _cut(tuple(n), tuple(blocks), device)
    missing = [0] * len(n)
    columns = [[*map(Tensor.data_ptr, some)] if some else missing for some in tensors]
    addresses = tuple(itertools.chain.from_iterable(zip(*columns, strict=True)))
    return number, _upload(addresses, device), shapes


@functools.lru_cache(maxsize=64)
def _cut(n: tuple[int, ...], blocks: tuple[int, ...], device: torch.device) -> tuple[int, Tensor]:
    shapes: list[int] = []
    number = 0
    for i, n_active in enumerate(n):
        _, outer, per_group, inner = blocks[4 * i : 4 * i + 4]
        across = ELEMENTS_ACROSS // max(1, outer * inner)
        at_most = max(across, -(-_LEAST_NEIGHBOURS // max(1, inner)))
        shapes += (n_active, outer, per_group, inner, at_most, number)
        number += -(-n_active // at_most)
    return number, _upload(tuple(shapes), device)


@functools.lru_cache(maxsize=64)
def _upload(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Equal numbers are copied once: addresses stay while the allocator repeats itself."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
