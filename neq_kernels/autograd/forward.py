"""The forward of every layer: PyTorch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def detached(tensor: Tensor | None) -> Tensor | None:
    """Without a gradient; None stays None."""
    return None if tensor is None else tensor.detach()


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in the forward of a Function."""
    if not weight.requires_grad and not input.is_contiguous() and not torch.compiler.is_compiling():
        # For a weight that needs no gradient PyTorch chooses many small products.
        weight = weight.detach().requires_grad_()
    out = F.linear(input, weight, bias)
    if torch.compiler.is_compiling() or out._is_view():
        # Of PyTorch's own making; autograd would refuse in-place activations on it.
        out = torch.ops.aten._unsafe_view(out, out.shape)
    return out


def convolution(weight: Tensor, transposed: bool) -> Callable[..., Tensor]:
    """PyTorch's function for as many dimensions."""
    functions: tuple[Callable[..., Tensor], ...] = _CONV_TRANSPOSE if transposed else _CONV
    return functions[weight.dim() - 3]


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    function = convolution(weight, transposed)
    if transposed:
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return function(input, weight, bias, stride, padding, dilation, groups)
