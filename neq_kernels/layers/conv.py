"""Convolutions with neurons that can be frozen."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from neq_kernels import functional
from neq_kernels.channels import NeuronLayout
from neq_kernels.layers.base import NeuronLayer, constructible


class _AnyConv(NeuronLayer):
    # torch.nn declares these differently from class to class.
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - len(self.kernel_size) - 1

    def _convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, **options: Any
    ) -> Tensor:
        out = functional.conv(
            input,
            weight,
            bias,
            self.channels,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            grad_input=self.grad_input,
            **options,
        )
        return self._anchored(out)


class _Conv(_AnyConv):
    padding_mode: Any
    _reversed_padding_repeated_twice: Any

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input)
        weight, bias = self._learned()
        if self.padding_mode == "zeros":
            return self._convolve(input, weight, bias, self.padding)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return self._convolve(padded, weight, bias, 0)


@constructible
class Conv1d(_Conv, nn.Conv1d):
    """``torch.nn.Conv1d`` with neurons that can be frozen: one per output channel."""


@constructible
class Conv2d(_Conv, nn.Conv2d):
    """``torch.nn.Conv2d`` with neurons that can be frozen: one per output channel."""


@constructible
class Conv3d(_Conv, nn.Conv3d):
    """``torch.nn.Conv3d`` with neurons that can be frozen: one per output channel."""


class _ConvTranspose(_AnyConv):
    _output_padding: Any

    @classmethod
    def layout_in(cls, layer: nn.Module) -> NeuronLayout:
        return NeuronLayout(layer.groups, axis=1)  # type: ignore[arg-type]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input, output_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return self._convolve(
            input,
            *self._learned(),
            self.padding,
            transposed=True,
            output_padding=tuple(output_padding),
        )


@constructible
class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with neurons that can be frozen: one per output channel."""


@constructible
class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with neurons that can be frozen: one per output channel."""


@constructible
class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with neurons that can be frozen: one per output channel."""
