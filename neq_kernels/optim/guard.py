"""The guard: lets any optimizer step, then puts the frozen neurons back.

Weights are put back always. State tensors of the parameter's shape are held too; other state is
out of reach and named in one warning. The cost is a copy of the frozen rows of the weights and of
that state before each step, and one after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.channels import NeuronLayout
from neq_kernels.optim.ownership import OwnedParameter


@dataclass(frozen=True)
class _FrozenRows:
    parameter: Parameter
    layout: NeuronLayout
    frozen: Tensor
    weights: Tensor
    state: dict[Any, Tensor]


class Guard:
    """Holds the frozen rows of one optimizer's parameters from before a step until after it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._held: list[_FrozenRows] = []
        self._warned = False

    @torch.no_grad()
    def save(self, guarded: Mapping[Parameter, OwnedParameter]) -> None:
        """Copy the frozen rows of these parameters and of their state."""
        # What a step that raised left behind is out of date by now.
        self._held.clear()
        for p, owned in guarded.items():
            if owned.all_active:
                continue
            frozen = owned.frozen(p.device).clone()
            state = {
                key: owned.layout.gather(value, frozen)
                for key, value in self._optimizer.state.get(p, {}).items()
                if _has_rows(value, p)
            }
            weights = owned.layout.gather(p, frozen)
            self._held.append(_FrozenRows(p, owned.layout, frozen, weights, state))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what :meth:`save` copied."""
        shared: set[str] = set()
        for rows in self._held:
            p = rows.parameter
            rows.layout.scatter_(p, rows.frozen, rows.weights)
            for key, value in self._optimizer.state.get(p, {}).items():
                if not _has_rows(value, p):
                    shared.add(str(key))
                elif key in rows.state:
                    rows.layout.scatter_(value, rows.frozen, rows.state[key])
        self._held.clear()
        if shared and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._optimizer).__name__}: frozen neurons do not move, but this state "
                f"has no row per neuron and goes on at every step: {', '.join(sorted(shared))}",
                stacklevel=2,
            )


def _has_rows(value: object, p: Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape
