"""Notices every change after which a plan for a step no longer holds."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.dispatch.selection import selector
from neq_kernels.optim.ownership import Ownership, remember, same_objects
from neq_kernels.sharding import is_distributed, local

# Of a group: what decides which steps its parameters get, not only how far they go.
_DECIDING_FLAGS = ("differentiable", "capturable", "fused", "momentum", "dampening", "amsgrad")

_dtype = operator.attrgetter("dtype")
_device = operator.attrgetter("device")


class Watch:
    """What a plan was made from. Everything is compared at every step, so nothing here runs a line
    of Python per parameter but what reads the memory formats.

    Args:
        optimizer, ownership: groups, state and active sets are theirs.
        parameters: those whose dtype, device and strides count, and whose gradients'.
    """

    def __init__(
        self, optimizer: Optimizer, ownership: Ownership, parameters: list[Parameter]
    ) -> None:
        self._optimizer, self._ownership, self._parameters = optimizer, ownership, parameters
        self._sharded = [p for p in parameters if is_distributed(p)]
        # A view shows what the dict holds later.
        self._state = [state.values() for state in optimizer.state.values()]
        self._objects = remember(self._read_objects())
        self._settings = self._read_settings()
        self._formats = self._read_formats()

    def sees_no_change(self) -> bool:
        return (
            self._formats is not None
            and self._settings == self._read_settings()
            and same_objects(self._objects, self._read_objects())
            and self._formats == self._read_formats()
        )

    def _read_objects(self) -> Iterator[object]:
        groups = self._optimizer.param_groups
        return itertools.chain(
            groups,
            *(group["params"] for group in groups),
            self._optimizer.state.values(),
            itertools.chain.from_iterable(self._state),
            map(type, self._parameters),
            map(local, self._sharded),
        )

    def _read_settings(self) -> list[object]:
        groups = self._optimizer.param_groups
        flags = [bool(group.get(flag)) for group in groups for flag in _DECIDING_FLAGS]
        sizes = [len(group["params"]) for group in groups]
        return [self._ownership.version, selector.revision, *sizes, *flags]

    def _read_formats(self) -> list[object] | None:
        """None for a tensor without strides (a sparse gradient): nothing is known of it."""
        grads = [p.grad for p in self._parameters]
        tensors: list[Tensor] = [*self._parameters, *(g for g in grads if g is not None)]
        try:
            strides = list(map(Tensor.stride, tensors))
        except RuntimeError:
            return None
        return [
            [g is None for g in grads],
            strides,
            list(map(_dtype, tensors)),
            list(map(_device, self._parameters)),
        ]
