"""Weight gradients inside captured CUDA graphs: which kernels may be used, and their rehearsal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.channels import NeuronLayout
from neq_kernels.dispatch import tuning_table
from neq_kernels.dispatch.selection import ExecutionContext, Grads, candidates, choice_for

logger = logging.getLogger(__name__)


_rehearsing = False


# What a captured graph may use: the kernels are loaded.
_rehearsed: dict[tuple[Problem, ExecutionContext, bool], KernelChoice] = {}


@contextmanager
def capturable() -> Iterator[None]:
    """Within it gradients are computed as in a CUDA graph: wrap the warm-up in it, or both.

    A captured graph reads the number of active channels on the device, with kernels that eager
    steps may not have used; loading a kernel is forbidden while a graph is captured. What was not
    warmed up here is captured densely: correct with every mask, and no faster for any.

    >>> with neq.capturable():
    ...     step = torch.cuda.make_graphed_callables(model, (example,))
    """
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


def captured(tensor: Tensor) -> bool:
    """Whether what runs now is captured into a CUDA graph, or rehearsed. When that is replayed
    other channels may be active: their number is then read on the device, or everything is
    computed."""
    if _rehearsing:
        return True
    if not tensor.is_cuda or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def replayed_choice(
    problem: Problem, place: ExecutionContext, output_mask: Sequence[bool], active_dgrad: bool
) -> KernelChoice:
    if active_dgrad and output_mask[0]:
        raise RuntimeError(
            'grad_input: expected "exact" while a CUDA graph is captured, got "active", which '
            "would go on propagating from the channels that are active now"
        )
    with_own = [b for b in place.backends if Strategy.CUSTOM in candidates(problem, b)]
    if not output_mask[1] or not with_own:
        return KernelChoice(Strategy.DENSE)
    key = problem, place, bool(output_mask[2])
    if _rehearsing:
        choice = choice_for(problem, problem.neurons, place)
        if choice.strategy != Strategy.CUSTOM:
            choice = place.choice(Strategy.CUSTOM, with_own[0])
        _rehearsed[key] = choice
    elif key not in _rehearsed:
        logger.warning(
            "a CUDA graph is captured densely for %s: its kernels were not loaded; warm up within "
            "neq_kernels.capturable()",
            tuning_table.key(problem, problem.neurons),
        )
        return KernelChoice(Strategy.DENSE)
    return _rehearsed[key]


def clear_frozen(grads: Grads, layout: NeuronLayout, order: Tensor, count: Tensor) -> None:
    """Zeros for the neurons ``order[count:]``, in place, with the count read on the device."""
    places = torch.arange(len(order), device=order.device)
    frozen = torch.empty_like(order).scatter_(0, order, places) >= count
    for grad, where in ((grads[1], layout), (grads[2], NeuronLayout())):
        if grad is not None:
            rows = where.rows(grad)
            leading = rows.shape[: 2 if where.groups > 1 else 1]
            rows.masked_fill_(frozen.view(*leading, *[1] * (rows.dim() - len(leading))), 0)
