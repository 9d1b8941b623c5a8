"""CUDA graphs: while one is captured nothing is known of the channels that its replays will find
active, and no kernel may be loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from neq_kernels.backends.base import Grads
from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.channels import NeuronLayout

logger = logging.getLogger(__name__)


class Rehearsal:
    """Remembers which kernels ran while a capture was rehearsed: those are loaded.

    Attributes:
        is_running: gradients are computed as in a CUDA graph now.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._rehearsed: dict[Hashable, KernelChoice] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, gradients are computed as in a CUDA graph."""
        before, self.is_running = self.is_running, True
        try:
            yield
        finally:
            self.is_running = before

    def captures(self, tensor: Tensor) -> bool:
        """Whether what runs now is captured into a CUDA graph, or rehearsed."""
        if self.is_running:
            return True
        if not tensor.is_cuda or not torch.cuda.is_initialized():
            return False
        return torch.cuda.is_current_stream_capturing()

    def choice(self, key: Hashable, choose: Callable[[], KernelChoice], about: str) -> KernelChoice:
        """The kernel that a graph may use: the one that was rehearsed, else PyTorch's.

        Args:
            key: what the choice is for.
            choose: the kernel to rehearse.
            about: names the problem in the warning that nothing was rehearsed.
        """
        if self.is_running:
            self._rehearsed[key] = choose()
        elif key not in self._rehearsed:
            logger.warning(
                "a CUDA graph is captured densely for %s: its kernels were not loaded; warm up "
                "within neq_kernels.capturable()",
                about,
            )
            return KernelChoice(Strategy.DENSE)
        return self._rehearsed[key]


def clear_frozen(grads: Grads, layout: NeuronLayout, order: Tensor, count: Tensor) -> None:
    """Zeros for the neurons ``order[count:]``, in place, with the count read on the device."""
    places = torch.arange(len(order), device=order.device)
    frozen = torch.empty_like(order).scatter_(0, order, places) >= count
    for grad, where in ((grads[1], layout), (grads[2], NeuronLayout())):
        if grad is not None:
            rows = where.rows(grad)
            leading = rows.shape[: 2 if where.groups > 1 else 1]
            rows.masked_fill_(frozen.view(*leading, *[1] * (rows.dim() - len(leading))), 0)
