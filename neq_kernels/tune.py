"""Measuring which strategies are fastest for the layers of a model; saving and restoring them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neq_kernels import contest, dispatch
from neq_kernels.convert import revert
from neq_kernels.layers import unwrap
from neq_kernels.measure.problems import problems_of
from neq_kernels.problem import Problem, Strategy
from neq_kernels.tuning import count_bucket

logger = logging.getLogger(__name__)


def tune(
    model: nn.Module,
    *inputs: Any,
    shares: Sequence[float] | None = None,
    seconds: float = 0.05,
) -> dict[str, dict[int, Strategy]]:
    """Measure the strategies for every linear layer and convolution of a model, keep the winners.

    From then on the layers use them: in this process, and in later ones on the same kind of machine
    with the same number of threads. Weight gradients of another shape, and numbers of active
    channels that were not measured, go by heuristics as before.

    Args:
        model: converted or not; it is not changed. CPU only.
        inputs: of one forward, with the batch size and image size of the training steps.
        shares: of active channels, each above 0 and at most 1; by default every number of channels
            that the table tells apart, which takes minutes for a large network.
        seconds: to spend on each measurement.

    Returns:
        by layer, the winner for each measured number of active channels.

    Raises:
        ValueError: a share out of range, no layer to measure, or a model that is not on the CPU.
    """
    if shares is not None and not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares: expected above 0 and at most 1, got {list(shares)}")
    plain = revert(copy.deepcopy(unwrap(model)))
    devices = {p.device.type for p in plain.parameters()}
    if devices - {"cpu"}:
        raise ValueError(f"model: expected parameters on the CPU, got {sorted(devices)}")
    layers = problems_of(plain, *inputs)
    if not layers:
        raise ValueError("model: expected linear layers or convolutions, got none that ran")
    backend = dispatch.backend_for("cpu")
    table = dispatch.table_for(torch.get_num_threads())
    winners: dict[Problem, dict[int, Strategy]] = {}
    for name, problem in layers.items():
        if problem in winners:
            continue
        usable = dispatch.candidates(problem, backend)
        winners[problem] = {
            n: contest.fastest(problem, n, dispatch.module_of(backend), usable, seconds=seconds)
            for n in _counts(problem.neurons, shares)
        }
        for n, winner in winners[problem].items():
            table.put(problem, n, winner)
        logger.info("tuned %s: %d of %d problems", name, len(winners), len(set(layers.values())))
    dispatch.forget_choices()
    table.save()
    return {name: winners[problem] for name, problem in layers.items()}


def tuning_state_dict() -> dict[str, Any]:
    """The measured winners in use (of the present number of threads), for a checkpoint."""
    return dispatch.table_for(torch.get_num_threads()).state_dict()


def load_tuning_state_dict(state: dict[str, Any]) -> None:
    """Use exactly the winners of a checkpoint, so that a resumed run makes the same bits.

    Raises:
        ValueError: ``state`` is not what :func:`tuning_state_dict` returned.
    """
    dispatch.table_for(torch.get_num_threads()).load_state_dict(state)
    dispatch.forget_choices()


def _counts(k: int, shares: Sequence[float] | None) -> list[int]:
    wanted = range(1, k + 1) if shares is None else [max(1, round(s * k)) for s in shares]
    return sorted({count_bucket(n, k) for n in wanted})
