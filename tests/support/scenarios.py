"""Scenarios that two processes of one group run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_all(rank: int, folder: str, scenarios: Iterable[Callable[..., Any]], *more: Any) -> None:
    """Run ``scenario(rank, *more)`` of each as rank ``rank`` of 2; the results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    results = {}
    try:
        for scenario in scenarios:
            torch.manual_seed(0)
            results[scenario.__name__] = scenario(rank, *more)
    finally:
        torch.save(results, Path(folder, f"results{rank}.pt"))
        dist.destroy_process_group()
