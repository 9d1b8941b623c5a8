"""Parameters whose neurons are spread over processes (``DTensor``: FSDP2, tensor parallel). Every
process steps, or holds, the part that lies in it."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of it lies in this process, sharing memory; a plain tensor itself."""
    return cast(Any, tensor).to_local() if is_distributed(tensor) else tensor


def local_grad(parameter: Tensor) -> Tensor | None:
    """The gradient of what lies in this process. Collective where the gradient of a replicated
    parameter is still to be summed over the ranks (tensor parallel)."""
    grad: Any = parameter.grad
    if grad is None or not is_distributed(grad):
        return cast(Tensor | None, grad)
    if not placed_alike(grad, parameter):
        grad = grad.redistribute(placements=cast(Any, parameter).placements)
    part = grad.to_local()
    return cast(Tensor, part.wait() if hasattr(part, "wait") else part)


def placed_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the parts of both that lie in this process belong together."""
    places = (cast(Any, t).placements if is_distributed(t) else None for t in (a, b))
    return next(places) == next(places)


def replicated_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A plain tensor, the same on every rank, as a ``DTensor`` that can meet ``parameter``."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, parameter).device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)


def part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """Of a plain tensor, the same on every rank and of as many dimensions as ``parameter``, the
    part that lies beside this process's part of ``parameter``. Dimensions of another size than the
    parameter's are not cut."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded = cast(Any, parameter)
    placements = [
        placement if whole.shape[dim] == parameter.shape[dim] else Replicate()
        for placement in sharded.placements
        for dim in (getattr(placement, "dim", 0),)
    ]
    whole = whole.to(parameter.device)
    # Without a source rank every rank cuts its own copy: nothing is sent.
    parts = distribute_tensor(whole, sharded.device_mesh, placements, src_data_rank=None)
    return local(parts)


def positions(parameter: Tensor, dim: int) -> Tensor:
    """Which positions of dimension ``dim`` lie in this process: int64 on the CPU."""
    size = [1] * parameter.dim()
    size[dim] = parameter.shape[dim]
    return part_of(parameter, torch.arange(size[dim]).view(size)).flatten().cpu()
