"""What data-parallel training needs while layers are wholly frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn


def in_process_group() -> bool:
    """Whether this process takes part in an initialised default process group."""
    return dist.is_available() and dist.is_initialized()


T = TypeVar("T")


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter."""
    for tensor in model.parameters():
        return tensor.device
    return torch.device("cpu")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if in_process_group() else 0


def together(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank; the results of all, in rank order.

    Raises:
        RuntimeError: ``work`` failed on another rank (so that no rank waits for one that is gone).
        Exception: whatever ``work`` raised on this one.
    """
    if not in_process_group():
        return [work()]
    error: Exception | None = None
    outcome: tuple[str, Any]
    try:
        outcome = ("", work())
    except Exception as failure:
        error = failure
        outcome = (f"{type(failure).__name__}: {failure}", None)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if error is not None:
        raise error
    failed = [f"rank {r}: {message}" for r, (message, _) in enumerate(outcomes) if message]
    if failed:
        raise RuntimeError("another rank failed; " + "; ".join(failed))
    return [result for _, result in outcomes]


def add_up(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Each tensor summed over the ranks, on the CPU; names, shapes and dtype (float64) agree."""
    if not tensors:
        return {}
    flat = torch.cat([tensor.to(device).flatten() for tensor in tensors.values()])
    if in_process_group():
        dist.all_reduce(flat)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def broadcast_masks(masks: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Rank 0's masks on every rank; names and lengths agree, bool on the CPU."""
    if not in_process_group() or not masks:
        return masks
    flat = torch.cat(list(masks.values())).to(device, torch.uint8)
    dist.broadcast(flat, src=0)
    parts = flat.cpu().bool().split([len(mask) for mask in masks.values()])
    return dict(zip(masks, parts, strict=True))
