"""attach: make a torch optimizer leave frozen neurons alone."""

from __future__ import annotations

import sys
from typing import get_args

from torch import nn
from torch.optim import Optimizer

from neq_kernels.layers.traversal import neuron_layers
from neq_kernels.optim.attached import AttachedOptimizer, is_attached_optimizer
from neq_kernels.optim.ownership import Ownership
from neq_kernels.optim.row_steps import ROW_STEPS, FrozenState
from neq_kernels.optim.wrappers import inner_optimizer


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    frozen_state: FrozenState = "reset",
    *,
    free_frozen_state: bool = False,
) -> AttachedOptimizer:
    """Make ``optimizer`` step only the active neurons of ``model``; frozen ones do not move.

    Exact ``torch.optim.SGD``, ``Adam`` and ``AdamW`` get row steps: a frozen neuron costs no
    optimizer time, and Adam counts the steps of each neuron (``state[p]["neq_step"]``, int64[K], a
    list of ints in ``state_dict``; ``step`` is the largest count), so its bias correction is right
    after a pause. While all neurons of a parameter are active and share one history, and for
    parameters no neuron owns, torch's own step runs. ``state_dict`` can be loaded by the plain
    optimizer and the other way round. ``optimizer.step``, closures, schedulers, ``GradScaler``,
    parameter groups and ``add_param_group`` work as before.

    A copy or a pickle of an attached optimizer is attached to the copy of the model that goes
    along: copy both in one call, ``copy.deepcopy((model, optimizer))``.

    Any other optimizer, and any parameter that row steps do not support (a ``differentiable`` or
    ``capturable`` group, a sparse gradient, a tensor subclass), takes the guard: it steps
    everything, then the frozen neurons' weights and their rows in state tensors of the parameter's
    shape are put back (``"keep"``, whatever ``frozen_state`` says). That costs a copy of those rows
    before and after each step. Other state goes on for all neurons alike: one warning names it. If
    such a step raises, the frozen neurons are not put back; what an optimizer does to weights
    outside ``step`` is out of reach.

    Args:
        optimizer: the user's optimizer, or a wrapper of accelerate, Fabric or Lightning around it.
            Its parameters may belong to neurons or not.
        model: the converted model, also wrapped in data parallel or ``torch.compile``.
        frozen_state: what happens to the state of a frozen neuron. ``"reset"``: momentum, both
            moments, the largest second moment and its step count become 0 when it freezes.
            ``"keep"``: all held. ``"reference"``: as in the published code of NEq
            (arXiv:2207.09455): momentum and first moment become 0, the second moment decays at
            every step and the count goes on.
        free_frozen_state: free the state of parameters of which no neuron is active, at the next
            step; with ``"reset"`` alone, where it would be zeros. It is made anew when a neuron
            thaws, ``state_dict`` has zeros in its place, and ``freed_state_bytes`` of the handle
            says what it took.

    Returns:
        A handle with ``report()``, ``freed_state_bytes`` and ``remove()``.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, is a wrapper that runs no step
            hooks, or is ``LBFGS``, whose state mixes all parameters; ``model`` is wrapped in
            FSDP1.
        ValueError: unknown ``frozen_state``; ``free_frozen_state`` with another one than
            ``"reset"``, or with an optimizer that takes the guard, which keeps; a model without
            neuron layers; an optimizer that holds none of their parameters, or is attached
            already.
    """
    optimizer = inner_optimizer(optimizer)
    if frozen_state not in get_args(FrozenState):
        raise ValueError(
            f"frozen_state: expected one of {get_args(FrozenState)}, got {frozen_state!r}"
        )
    if not isinstance(free_frozen_state, bool):
        got = type(free_frozen_state).__name__
        raise TypeError(f"free_frozen_state: expected a bool, got {got}")
    if free_frozen_state and (frozen_state != "reset" or type(optimizer) not in ROW_STEPS):
        raise ValueError(
            "free_frozen_state: expected SGD, Adam or AdamW and frozen_state='reset', which leave "
            f"zeros that need not be stored, got {type(optimizer).__name__} and {frozen_state!r}"
        )
    if is_attached_optimizer(optimizer):
        raise ValueError(
            "optimizer: expected one that is not attached, got one that is: call remove() on its "
            "handle first (for several models attach a torch.nn.ModuleList of them)"
        )
    _refuse_flat_parameters(model)
    ownership = Ownership(model)
    if not ownership.parameters:
        raise ValueError(
            "model: expected neuron layers, got none: call neq_kernels.convert(model) before attach"
        )
    held = (p for group in optimizer.param_groups for p in group["params"])
    if not any(p in ownership.parameters for p in held):
        raise ValueError(
            "optimizer: expected it to hold parameters of the model's neuron layers, got none of "
            "them: make it from this model's parameters"
        )
    return AttachedOptimizer(optimizer, ownership, frozen_state, free_frozen_state)


def _refuse_flat_parameters(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()
    ):
        raise TypeError(
            "model: expected parameters that neurons can be found in, got "
            "FullyShardedDataParallel, which flattens those of many layers into one; use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def is_attached(model: nn.Module) -> bool:
    """Whether an optimizer is attached to ``model``. (A copy of a model has none.)

    Raises:
        ValueError: a model without neuron layers.
    """
    return any(layer.anchor.optimizers for layer in neuron_layers(model))
