"""Autocast at the boundary of the autograd Functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocasts(tensor: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    device_type = tensor.device.type
    # Asking about a device without autocast, such as meta, is an error.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not autocasts(input):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(input), cast(weight), None if bias is None else cast(bias)


def autocast_dtype_on_cpu() -> torch.dtype | None:
    """What autocast casts CPU tensors to; None where it does not."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class CastOperands(NamedTuple):
    """What a layer computes with under autocast.

    Attributes:
        input, weight: of the right dtype, size and strides; their values are not to be read.
        dtype: that they are cast to; None: they are as they are.
        in_float: the parameters are float32, and so are their gradients.
    """

    input: Tensor
    weight: Tensor
    dtype: torch.dtype | None
    in_float: bool


def operands_as_cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> CastOperands | None:
    """The operands of a layer, without casting them; None where autocast leaves one as it is."""
    dtype = autocast_dtype_on_cpu() if autocasts(input) else None
    if dtype is None:
        return CastOperands(input, weight, None, False)
    if any(t is not None and t.dtype not in _CAST for t in (input, weight, bias)):
        return None
    x, w = (t if t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in (input, weight))
    return CastOperands(x, w, dtype, weight.dtype == torch.float32)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A backward called inside autocast must not cast what the forward did not."""
    if autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()
