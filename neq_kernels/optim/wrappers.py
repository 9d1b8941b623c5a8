"""Find the optimizer inside what trainers wrap it in."""

from __future__ import annotations

import sys
from typing import Any

from torch.optim import LBFGS, Optimizer

# Wrappers whose step is that of the optimizer inside: module, class, attribute.
_TRANSPARENT = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("lightning.fabric.wrappers", "_FabricOptimizer", "_optimizer"),
    ("lightning_fabric.wrappers", "_FabricOptimizer", "_optimizer"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer", "_optimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer", "_optimizer"),
)


def inner_optimizer(optimizer: Any) -> Optimizer:
    """``optimizer``, or the one inside a wrapper of accelerate, Fabric or Lightning.

    Raises:
        TypeError: no ``torch.optim.Optimizer``, one that runs no step hooks, or ``LBFGS``.
    """
    for module, name, attribute in _TRANSPARENT:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(optimizer, kind):
            return inner_optimizer(getattr(optimizer, attribute))
    got = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {got} (attach the optimizer inside "
            "a wrapper, if the wrapper itself moves no weights)"
        )
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "optimizer: expected one that updates every weight by itself, got LBFGS, whose "
            "history mixes the weights of active and frozen neurons"
        )
    runs_hooks = getattr(type(optimizer).step, "hooked", False)
    if not runs_hooks or not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        raise TypeError(
            f"optimizer: expected one that runs step hooks, got {got}, which has never called "
            "torch.optim.Optimizer.__init__: attach the optimizer inside, if this wrapper itself "
            "moves no weights (Lookahead does, and would move frozen neurons)"
        )
    return optimizer
