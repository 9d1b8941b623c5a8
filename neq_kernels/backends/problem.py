"""A wgrad problem: what a weight gradient is computed for, and the strategies to compute it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels.channels import NeuronLayout


class Strategy(IntEnum):
    """How the weight gradient of some active channels is computed.

    - ``DENSE``: PyTorch's kernel for all channels, then zeros over the frozen ones;
    - ``PACK``: the active channels of dY are gathered, or taken as a view where they are
      neighbours, and given to PyTorch's kernel;
    - ``CUSTOM``: the backend's custom kernel, which gathers as it multiplies, or packs first.

    With no channel active there is nothing to compute, whatever the strategy.
    """

    DENSE = 0
    PACK = 1
    CUSTOM = 2


class KernelChoice(NamedTuple):
    """How a weight gradient is computed.

    Attributes:
        strategy: dense, packed, or by a custom kernel.
        settings: which way of running a custom kernel that has several; empty: its default.
        backend: whose kernel, where several backends are in use; empty: the first one's.
    """

    strategy: Strategy
    settings: tuple[int, ...] = ()
    backend: str = ""


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of a convolution that are not tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def layout(self) -> NeuronLayout:
        """Where a neuron lies in the weight."""
        return NeuronLayout(self.groups, axis=1) if self.transposed else NeuronLayout()

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        output_mask: Sequence[bool],
        groups: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``aten.convolution_backward``: gradients of input, weight, bias; None if not asked for."""
        grads = torch.ops.aten.convolution_backward.default(
            grad_output,
            input,
            weight,
            [grad_output.shape[1]] if output_mask[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups if groups is None else groups,
            output_mask,
        )
        # oneDNN computes weight and bias together, and may return one that was not asked for.
        dx, dw, db = (g if w else None for g, w in zip(grads, output_mask, strict=True))
        return dx, dw, db


class Problem(NamedTuple):
    """The weight gradient of one layer, apart from the values and the active channels.

    Attributes:
        input_size: ``[N, Cin, *spatial]``; of a linear layer ``[T, Cin]``, all rows together.
        weight_size: of the weight.
        geometry: of the convolution; None for a linear layer.
        channels_last: how the input lies in memory.
        dtype: of the operands.
    """

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    geometry: ConvGeometry | None
    channels_last: bool
    dtype: torch.dtype

    @classmethod
    def linear(cls, rows: int, weight: Tensor) -> Problem:
        """Of a linear layer that was given ``rows`` vectors."""
        return cls((rows, weight.shape[1]), tuple(weight.shape), None, False, weight.dtype)

    @classmethod
    def conv(cls, input: Tensor, weight: Tensor, geometry: ConvGeometry) -> Problem:
        """Of a convolution of ``input``."""
        last = input.dim() == 4 and not input.is_contiguous()
        last = last and input.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(input.shape), tuple(weight.shape), geometry, last, weight.dtype)

    @property
    def neurons(self) -> int:
        """K, the number of output channels."""
        if self.geometry is not None and self.geometry.transposed:
            return self.weight_size[1] * self.geometry.groups
        return self.weight_size[0]

    @property
    def is_depthwise(self) -> bool:
        """A 2d convolution in which every output channel reads one input channel."""
        g = self.geometry
        return (
            g is not None
            and len(self.weight_size) == 4
            and not g.transposed
            and g.groups == self.input_size[1] > 1
        )

    @property
    def is_plain_conv2d(self) -> bool:
        """A 2d convolution, neither transposed nor grouped."""
        g = self.geometry
        return g is not None and len(self.weight_size) == 4 and not g.transposed and g.groups == 1

    @property
    def output_positions(self) -> int:
        """T, the length of the reduction: images times output pixels, or rows."""
        g = self.geometry
        if g is None:
            return self.input_size[0]
        spatial = self.input_size[2:]
        if g.transposed:  # each input pixel meets each tap once
            return self.input_size[0] * math.prod(spatial)
        sizes = (
            max(0, (i + 2 * p - d * (k - 1) - 1) // s + 1)
            for i, p, d, k, s in zip(
                spatial, g.padding, g.dilation, self.weight_size[2:], g.stride, strict=True
            )
        )
        return self.input_size[0] * math.prod(sizes)

    @property
    def row_size(self) -> int:
        """Elements of one neuron's weight."""
        return math.prod(self.weight_size) // max(1, self.neurons)
