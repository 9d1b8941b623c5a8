"""What a batch of the probe may be: how it enters a model, moves to a device, is recognised."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def model_input(batch: Any) -> Tensor | dict[str, Any]:
    """What the model is called with when the user gives no ``forward``.

    Raises:
        ValueError: the batch is none of the kinds that need no ``forward``.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise ValueError(
        "probe: expected batches that are a tensor, a tuple or list that starts with a tensor, or "
        f"a dict of keyword arguments, got {_describe(batch)}; for any other kind give "
        "forward=lambda model, batch: ..."
    )


def call_model(model: nn.Module, batch: Any) -> Any:
    """The forward used when the user gives none; ``batch`` comes from :func:`model_input`."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def moved_copy(batch: Any, device: torch.device) -> Any:
    """A copy of ``batch`` with every tensor in it on ``device``.

    Objects other than dicts, lists and tuples go through their own ``to(device)``, if they have it.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)
    if isinstance(batch, dict):
        return {key: moved_copy(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved_copy(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved_copy(value, device) for value in batch)
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def fingerprint(batch: Any) -> str:
    """Shapes, dtypes and a checksum of the contents: equal for equal batches.

    Tensors, arrays, numbers and strings inside mappings, sequences and dataclasses count; of any
    other object only its type does.
    """
    parts: list[str] = []
    checksum = _walk(batch, parts, 0)
    return f"{' '.join(parts)} #{checksum:08x}"


def is_empty(batch: Any) -> bool:
    """Whether the batch has tensors and none of them has an element."""
    sizes = [tensor.numel() for tensor in tensors_in(batch)]
    return bool(sizes) and not any(sizes)


def _walk(value: Any, parts: list[str], checksum: int) -> int:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        parts.append(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(data.data, checksum)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            checksum = _walk(value[key], parts, zlib.crc32(repr(key).encode(), checksum))
        return checksum
    if isinstance(value, (tuple, list)):
        for item in value:
            checksum = _walk(item, parts, checksum)
        return zlib.crc32(str(len(value)).encode(), checksum)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return zlib.crc32(repr(value).encode(), checksum)
    return zlib.crc32(type(value).__qualname__.encode(), checksum)


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        return f"a {name} of {[type(item).__name__ for item in batch[:4]]}"
    return name
