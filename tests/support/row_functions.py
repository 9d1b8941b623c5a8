"""The row functions of either implementation, called for one parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neq_kernels.backends.base import Backend
from neq_kernels.channels import NeuronLayout
from neq_kernels.optim import reference


def step_one(
    backend: Backend | None,
    function: str,
    param: Tensor,
    grad: Tensor,
    state: tuple[Tensor | None, ...],
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    **settings: Any,
) -> None:
    """``backend`` None: ``optim.reference``. ``state``: what lies between ``grad`` and ``order`` in
    the function's arguments."""
    if backend is None:
        getattr(reference, function)(param, grad, *state, order, n, layout, **settings)
        return
    lists = [[] if tensor is None else [tensor] for tensor in state]
    blocks = layout.blocks(param) or (1, 1, 1, param.numel())
    getattr(backend, function)([param], [grad], *lists, [order], [n], blocks, **settings)
