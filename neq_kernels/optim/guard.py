"""The guard: lets any optimizer step, then puts the frozen neurons back.

Weights are put back always. State tensors of the parameter's shape are held too; other state is
out of reach and named in one warning. Muon updates each row with the momentum of all of them: there
the momentum of frozen rows is cleared before the step instead. The cost is a copy of the frozen
rows of the weights and of that state before each step, and one after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Muon, Optimizer

from neq_kernels.optim.neurons_here import FrozenElements, FrozenRows
from neq_kernels.optim.ownership import OwnedParameter
from neq_kernels.sharding import is_distributed, local


@dataclass(frozen=True)
class _Held:
    parameter: Parameter
    frozen: FrozenRows | FrozenElements
    weights: Tensor
    state: dict[Any, Tensor]


class Guard:
    """Holds the frozen rows of one optimizer's parameters from before a step until after it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._held: list[_Held] = []
        # Momentum that frozen rows were left with would go into every update of the others.
        self._mixes_rows = isinstance(optimizer, Muon)
        self._warned = False

    @torch.no_grad()
    def save(self, guarded: Mapping[Parameter, OwnedParameter]) -> None:
        """Copy the frozen rows of these parameters and of their state."""
        # What a step that raised left behind is out of date by now.
        self._held.clear()
        for p, owned in guarded.items():
            if owned.all_active:
                continue
            frozen = owned.frozen_here(p)
            state = {}
            for key, value in self._optimizer.state.get(p, {}).items():
                if _has_rows(value, p):
                    if self._mixes_rows:
                        frozen.clear(local(value))
                    state[key] = frozen.read(local(value))
            self._held.append(_Held(p, frozen, frozen.read(local(p)), state))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what :meth:`save` copied."""
        shared: set[str] = set()
        for held in self._held:
            p, frozen = held.parameter, held.frozen
            frozen.write(local(p), held.weights)
            for key, value in self._optimizer.state.get(p, {}).items():
                if not _has_rows(value, p):
                    shared.add(str(key))
                elif key in held.state:
                    frozen.write(local(value), held.state[key])
        self._held.clear()
        if shared and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._optimizer).__name__}: frozen neurons do not move, but this state "
                f"has no row per neuron and goes on at every step: {', '.join(sorted(shared))}; "
                "a neuron that thaws is stepped as if it had not paused, which is approximate",
                stacklevel=2,
            )


def _has_rows(value: object, p: Parameter) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == p.shape
        and is_distributed(value) == is_distributed(p)
    )
