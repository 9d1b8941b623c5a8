"""Hooks that tell of the forwards of training steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardWatch:
    """Tells of every eager forward of these layers that records gradients, before it runs, until it
    is removed. A copy of a layer loses its copy of the hook at its first forward.

    Args:
        layers: the layers.
        notify: a bound method, held weakly: with its object the hooks go.
    """

    def __init__(
        self, layers: Iterable[nn.Module] = (), notify: Callable[[], None] | None = None
    ) -> None:
        self._notify = None if notify is None else weakref.WeakMethod(notify)
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self) for layer in layers
        ]

    def __call__(self, layer: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        notify = None if self._notify is None else self._notify()
        if notify is None:
            hooks = layer._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
        elif torch.is_grad_enabled() and not getattr(layer, "_is_replica", False):
            notify()

    def __reduce__(self) -> tuple[type[ForwardWatch], tuple[()]]:
        return ForwardWatch, ()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
