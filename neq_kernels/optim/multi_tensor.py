"""The row steps of many parameters in few calls: one of a backend for all that it supports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend
from neq_kernels.channels import NeuronLayout
from neq_kernels.optim import reference
from neq_kernels.sharding import is_distributed, local, local_grad


class RowStep(NamedTuple):
    """One parameter's row step.

    Attributes:
        parameter: stepped with the gradient it has when the step runs.
        state: the state tensors (what of them lies in this process), in the order the row functions
            take them.
        order: the active neurons first.
        n: how many are active.
        layout: where a neuron lies in ``parameter``.
        backend: whose row function runs, for many parameters in a call; None: that of
            ``optim.reference``.
    """

    parameter: Tensor
    state: tuple[Tensor | None, ...]
    order: Tensor
    n: int
    layout: NeuronLayout
    backend: Backend | None


class _Batch:
    """Steps of parameters of one dtype on one device, as the lists that backends take."""

    def __init__(self, steps: list[RowStep]) -> None:
        backend = steps[0].backend
        assert backend is not None
        self._backend = backend
        self._holders = [step.parameter for step in steps]
        self._sharded = any(map(is_distributed, self._holders))
        self._parameters = list(map(local, self._holders))
        # State that is missing for one is missing for all.
        self._state = [
            [] if tensors[0] is None else list(tensors)
            for tensors in zip(*(step.state for step in steps), strict=True)
        ]
        self._orders = [step.order for step in steps]
        self._n = [step.n for step in steps]
        self._blocks = [
            i
            for step, p in zip(steps, self._parameters, strict=True)
            for i in _blocks(step.layout, p)
        ]

    def run(self, function: str, flags: dict[str, Any]) -> None:
        if self._sharded:
            grads = list(map(local_grad, self._holders))
        else:
            grads = [p.grad for p in self._holders]
        step = getattr(self._backend, function)
        step(self._parameters, grads, *self._state, self._orders, self._n, self._blocks, **flags)


class Batches:
    """The row steps of one parameter group.

    Args:
        function: ``"sgd_rows_"`` or ``"adam_rows_"``.
        steps: parameters that have a gradient.
    """

    def __init__(self, function: str, steps: Iterable[RowStep]) -> None:
        self._function = function
        self._single: list[RowStep] = []
        alike: dict[object, list[RowStep]] = {}
        for step in steps:
            if step.backend is None:
                self._single.append(step)
            else:
                p, missing = step.parameter, tuple(tensor is None for tensor in step.state)
                alike.setdefault((step.backend, p.dtype, p.device, missing), []).append(step)
        self._batches = [_Batch(some) for some in alike.values()]

    def run(self, flags: dict[str, Any]) -> None:
        """One step of every parameter, with the group's settings as they are now."""
        for batch in self._batches:
            batch.run(self._function, flags)
        for p, state, order, n, layout, _ in self._single:
            step = getattr(reference, self._function)
            step(local(p), local_grad(p), *state, order, n, layout, **flags)


class ScalarSteps:
    """The scalar ``step`` of some parameters, advanced together."""

    def __init__(self, scalars: list[Tensor]) -> None:
        self._on_cpu = [scalar for scalar in scalars if scalar.is_cpu]
        self._elsewhere = [scalar for scalar in scalars if not scalar.is_cpu]
        self._one = torch.tensor(1.0, device="cpu")

    def advance(self) -> None:
        """Add 1 to each."""
        if self._on_cpu:
            # A Python number would be made a tensor once for every element of the list.
            torch._foreach_add_(self._on_cpu, self._one, alpha=1.0)
        if self._elsewhere:
            torch._foreach_add_(self._elsewhere, 1)


def _blocks(layout: NeuronLayout, parameter: Tensor) -> tuple[int, int, int, int]:
    blocks = layout.blocks(parameter)
    assert blocks is not None, "a backend was chosen for a memory format it does not support"
    return blocks
