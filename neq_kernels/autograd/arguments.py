"""Checks and normal forms of the arguments of ``functional.linear`` and ``functional.conv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from neq_kernels.autograd.amp import autocasts
from neq_kernels.channels import ActiveChannels

GradInput = Literal["exact", "active"]


def expanded(weight: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With a number for each dimension."""
    stride, padding, dilation, groups, transposed, output_padding = arguments
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(f"weight: expected 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    if transposed and isinstance(padding, str):
        raise ValueError(f"padding: expected numbers, got {padding!r}")
    return (
        _expand("stride", stride, spatial),
        padding if isinstance(padding, str) else _expand("padding", padding, spatial),
        _expand("dilation", dilation, spatial),
        groups,
        transposed,
        _expand("output_padding", output_padding, spatial),
    )


def string_padding(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, tuple[int, ...]]:
    """The input, padded where "same" is asymmetric, and the symmetric rest of the padding."""
    spatial = weight.dim() - 2
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return input, (0,) * spatial
    if any(s != 1 for s in stride):
        raise ValueError(f"padding: 'same' expects stride 1, got {tuple(stride)}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):
        input = F.pad(input, [p for extra in reversed(odd) for p in (0, extra)])
    return input, tuple(t // 2 for t in total)


def _expand(name: str, value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial:
        raise ValueError(f"{name}: expected {spatial} numbers, got {values}")
    return values


def check_grad_input(grad_input: str) -> None:
    if grad_input not in ("exact", "active"):
        raise ValueError(f"grad_input: expected 'exact' or 'active', got {grad_input!r}")


def validate(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: ActiveChannels,
    k: int,
    grad_input: str,
) -> None:
    check_grad_input(grad_input)
    if len(channels) != k:
        raise ValueError(f"channels: expected {k} channels, got {len(channels)}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {input.dtype}")
    dtype = input.dtype
    if weight.dtype == dtype and (bias is None or bias.dtype == dtype):
        return
    if autocasts(input):
        return
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected the input's dtype {dtype}, got {tensor.dtype}")
