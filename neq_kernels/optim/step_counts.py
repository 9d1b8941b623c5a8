"""The per-neuron step counts: in the optimizer's state, and on their way to and from a checkpoint.

In memory ``state[p]["neq_step"]`` is an int64 tensor ``[K]`` on the parameter's device. It exists
only where counts may differ between neurons. In a ``state_dict`` each count is five digits, uint8
``[K, 5]``: torch casts tensors of a loaded state to the parameter's dtype, and bf16 has no room for
a count; distributed checkpoints flatten tensors and numbers, but no lists. They also load only what
a fresh optimizer's ``state_dict`` has, so where there are no counts digits say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.optim.ownership import OwnedParameter

COUNTS = "neq_step"

_BASE, _N_DIGITS = 128, 5
_NO_COUNTS = _BASE**_N_DIGITS - 1

State = dict[str, Any]


def as_digits(counts: Tensor | None, k: int, device: torch.device) -> Tensor:
    """Counts as they are saved; None: that there are none for ``k`` neurons."""
    if counts is None:
        return torch.full((k, _N_DIGITS), _BASE - 1, dtype=torch.uint8, device=device)
    powers = _BASE ** torch.arange(_N_DIGITS, device=device)
    return (counts.unsqueeze(1) // powers % _BASE).to(torch.uint8)


def _from_saved(value: Any, device: torch.device) -> Tensor | None:
    """From digits, or from the list of counts that 0.1.0 saved."""
    if not isinstance(value, (Tensor, list)):  # torch fills in {} for what a flat state lacks
        return None
    counts = torch.as_tensor(value, device=device).long()
    if counts.dim() == 2:
        counts = (counts * _BASE ** torch.arange(counts.shape[1], device=device)).sum(1)
    return None if bool((counts == _NO_COUNTS).any()) else counts


def restore_counts(optimizer: Optimizer, owned: Mapping[Parameter, OwnedParameter]) -> None:
    """After loading: digits back to counts. Those that no longer fit ``step`` are dropped, as
    those of a state that a plain torch optimizer has carried on with; they follow from ``step``.

    Raises:
        ValueError: another number of counts than the parameter has neurons.
    """
    for p, state in optimizer.state.items():
        if COUNTS not in state:
            continue
        counts = _from_saved(state.pop(COUNTS), p.device)
        owner = owned.get(p) if isinstance(p, Parameter) else None
        if owner is None or owner.mixed or counts is None:
            continue
        expected = len(owner.channels)
        if counts.shape != (expected,):
            raise ValueError(
                f"{owner.name}: expected {COUNTS} of {expected} neurons, "
                f"got shape {tuple(counts.shape)}"
            )
        if "step" not in state or int(state["step"]) == int(counts.max()):
            state[COUNTS] = counts


def drop_counts(optimizer: Optimizer, parameters: Iterable[Parameter]) -> None:
    """Forget the counts of parameters that torch steps from now on."""
    for p in parameters:
        if p in optimizer.state:
            optimizer.state[p].pop(COUNTS, None)


def counts_from(scalar: Tensor | int, k: int, device: torch.device) -> Tensor:
    """``k`` equal counts."""
    return torch.full((k,), int(scalar), dtype=torch.int64, device=device)
