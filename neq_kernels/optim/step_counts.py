"""The per-neuron step counts: in the optimizer's state, and on their way to and from a checkpoint.

In memory ``state[p]["neq_step"]`` is an int64 tensor ``[K]`` on the parameter's device. It exists
only where counts may differ between neurons. In a ``state_dict`` it is a list of ints, because
torch casts tensors of a loaded state to the parameter's dtype and bf16 has no room for a count.
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

State = dict[str, Any]


def saved_counts_as_lists(optimizer: Optimizer, state_dict: State) -> State:
    """State-dict post-hook: int64 tensors out, lists of ints in; the optimizer's own stay."""
    saved = {
        key: {**state, COUNTS: state[COUNTS].tolist()} if _has_tensor(state) else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": saved}


def restore_counts(optimizer: Optimizer, owned: Mapping[Parameter, OwnedParameter]) -> None:
    """After loading: lists back to tensors. Counts that no longer fit ``step`` are dropped, as
    those of a state that a plain torch optimizer has carried on with; they follow from ``step``.

    Raises:
        ValueError: a list of another length than the parameter has neurons.
    """
    for p, state in optimizer.state.items():
        if COUNTS not in state:
            continue
        counts = torch.as_tensor(state.pop(COUNTS), dtype=torch.int64, device=p.device)
        owner = owned.get(p) if isinstance(p, Parameter) else None
        if owner is None:
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


def _has_tensor(state: object) -> bool:
    return isinstance(state, dict) and isinstance(state.get(COUNTS), Tensor)
