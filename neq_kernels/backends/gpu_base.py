"""Code shared by the CUDA and Triton backends: which gradients a custom kernel computes, and the
tables that one launch reads to step many parameters."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from neq_kernels.backends.aten import Aten
from neq_kernels.backends.base import Grads, in_layout_of
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Strategy
from neq_kernels.channels import Active, NeuronLayout

# The gradients of weight and bias; the bias's is None if it was not asked for.
WeightGrads = tuple[Tensor, Tensor | None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Elements of a step of a block that works across neurons.
ELEMENTS_ACROSS = 512
# Where neurons lie side by side: what a block has of them fills the sectors that it touches.
_LEAST_NEIGHBOURS = 8
_MOST_WEIGHTS_OF_A_NEURON = 2**27  # what a block has is numbered in 32 bits


class Gpu(Aten):
    """Custom kernels for weight gradients, PyTorch's for the rest.

    Attributes:
        device_type: of the tensors that the kernels take.
    """

    for_gpus = True
    device_type: ClassVar[str] = "cuda"

    def supports(self, device_type: str) -> bool:
        return device_type == self.device_type

    @abstractmethod
    def linear_wgrad(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        active: Active,
        with_bias: bool,
        settings: tuple[int, ...],
    ) -> WeightGrads:
        """By the custom kernel, of the matrices ``[T, K]`` and ``[T, C]``; it reads
        ``active.count``."""

    @abstractmethod
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
        """By the custom kernel; it reads ``active.count``."""

    def linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        """As that of ``aten``; the weight gradient by the custom kernel if it was chosen."""
        if not _is_custom(choice, active, grad_output, weight, output_mask):
            return super().linear_backward(
                grad_output,
                input,
                weight,
                output_mask,
                input_size=input_size,
                active=active,
                choice=choice,
            )
        assert input is not None
        dy = grad_output.reshape(-1, len(active.order))
        grad_input = dy.mm(weight).reshape(input_size) if output_mask[0] else None
        x = input.reshape(len(dy), -1)
        dw, db = self.linear_wgrad(dy, x, weight, active, output_mask[2], choice.settings)
        return grad_input, in_layout_of(weight, dw), db

    def conv_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        """As that of ``aten``; the weight gradient by the custom kernel if it was chosen."""
        if not _is_custom(choice, active, grad_output, weight, output_mask):
            return super().conv_backward(
                grad_output,
                input,
                weight,
                output_mask,
                input_size=input_size,
                geometry=geometry,
                active=active,
                choice=choice,
            )
        assert input is not None
        grad_input = None
        if output_mask[0]:
            grad_input = geometry.backward(grad_output, input, weight, (True, False, False))[0]
        like = weight if geometry.layout.blocks(weight) is not None else weight.contiguous()
        dw, db = self.conv_wgrad(
            grad_output, input, like, geometry, active, output_mask[2], choice.settings
        )
        return grad_input, in_layout_of(weight, dw), db

    def supports_row_steps(self, parameter: Tensor, layout: NeuronLayout) -> bool:
        blocks = layout.blocks(parameter)
        return (
            parameter.device.type == self.device_type
            and parameter.dtype in DTYPES
            and blocks is not None
            and blocks[1] * blocks[3] < _MOST_WEIGHTS_OF_A_NEURON
        )


def _is_custom(
    choice: KernelChoice,
    active: Active,
    grad_output: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
) -> bool:
    return (
        choice.strategy == Strategy.CUSTOM
        and output_mask[1]
        and active.n > 0
        and grad_output.numel() > 0
        and weight.numel() > 0
    )


@functools.lru_cache(maxsize=8192)
def count_of(n: int, device: torch.device) -> Tensor:
    """int32[1] on the device: n."""
    with torch.inference_mode(False):
        return torch.tensor([n], dtype=torch.int32, device=device)


# --- row steps of many parameters ----------------------------------------------------------------


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
