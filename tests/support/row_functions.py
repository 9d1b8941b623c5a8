"""The row functions of either implementation, called for one parameter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from neq_kernels.channels import NeuronLayout
from tests.support.backends import cpu


def step_one(
    module: ModuleType,
    function: str,
    param: Tensor,
    grad: Tensor,
    state: tuple[Tensor | None, ...],
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    **settings: Any,
) -> None:
    """``state``: what lies between ``grad`` and ``order`` in the function's arguments."""
    if module is not cpu:
        getattr(module, function)(param, grad, *state, order, n, layout, **settings)
        return
    lists = [[] if tensor is None else [tensor] for tensor in state]
    blocks = layout.blocks(param) or (1, 1, 1, param.numel())
    getattr(cpu, function)([param], [grad], *lists, [order], [n], blocks, **settings)
