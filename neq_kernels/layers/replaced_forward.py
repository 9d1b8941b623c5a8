"""Layers whose ``forward`` somebody has replaced on the object: accelerate's hooks, compiled or
wrapped methods."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


def replaced_forward(layer: nn.Module) -> bool:
    """Whether the layer has a forward of its own in which :func:`rebind` reaches nothing."""
    own = layer.__dict__
    if "forward" not in own or _is_bound(layer, own["forward"], type(layer)):
        return False
    # accelerate's calls what stands there at each call.
    return not ("_hf_hook" in own and _is_bound(layer, own.get("_old_forward"), type(layer)))


def calls_its_class(layer: nn.Module) -> bool:
    """Whether the layer's forward, wherever it was replaced, comes down to that of its class."""
    return not replaced_forward(layer) or _leads_to(layer, layer.__dict__["forward"], set())


def rebind(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Let bound methods of class ``old`` that the object holds be those of class ``new``."""
    for name, value in list(layer.__dict__.items()):
        if _is_bound(layer, value, old):
            layer.__dict__[name] = MethodType(getattr(new, value.__name__), layer)


def _is_bound(layer: nn.Module, value: Any, kind: type[nn.Module]) -> bool:
    return (
        isinstance(value, MethodType)
        and value.__self__ is layer
        and value.__func__ is getattr(kind, value.__name__, None)
    )


def _leads_to(layer: nn.Module, function: Any, seen: set[int]) -> bool:
    """Whether a chain of wrappers ends in the forward of the layer's class."""
    if function is None or id(function) in seen:
        return False
    seen.add(id(function))
    if _is_bound(layer, function, type(layer)):
        return True
    inner = [getattr(function, name, None) for name in _WRAPPED]
    inner += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return any(_leads_to(layer, f, seen) for f in inner if callable(f) and f is not layer)


_WRAPPED = ("__wrapped__", "__func__", "func", "_torchdynamo_orig_callable", "_orig_callable")
