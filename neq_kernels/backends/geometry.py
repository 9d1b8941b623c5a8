"""A convolution apart from its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neq_kernels.channels import NeuronLayout


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of a convolution that are not tensors."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
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
        wanted: Sequence[bool],
        groups: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``aten.convolution_backward``: (grad_input, grad_weight, grad_bias), None if unwanted."""
        grads = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            [grad_output.shape[1]] if wanted[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups if groups is None else groups,
            wanted,
        )
        # oneDNN computes weight and bias together, and may return one that was not asked for.
        dx, dw, db = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dx, dw, db
