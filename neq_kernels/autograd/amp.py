"""Autocast at the boundary of the autograd Functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A backward called inside autocast must not cast what the forward did not."""
    if autocasts(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()
