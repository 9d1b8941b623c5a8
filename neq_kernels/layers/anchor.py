"""Keep parameters of wholly frozen layers visible to those who wait for their gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary


class Attached(Protocol):
    """An optimizer attached to the model."""

    def stand_in(self, frozen: Collection[Parameter]) -> Parameter | None:
        """What should get a gradient of zeros because nothing the optimizer holds learns; asked for
        the parameters of every wholly frozen layer, answered for those of one."""


class ParameterAnchor:
    """Parameters of wholly frozen layers that the forward has passed without a graph.

    DistributedDataParallel waits for every parameter in every backward, and counts in the first one
    which get a gradient (``static_graph=True``). The next output that does need a gradient takes
    the waiting parameters along as extra inputs of a Function that returns zeros for them: the
    reducer and every hook see them. Without a process group only a stand-in waits for each
    optimizer of which nothing learns, because ``GradScaler.step`` refuses one without gradients.

    Attributes:
        optimizers: those attached to the model. A copy of the model has none.
        stopped: what has run last under a recording of gradients was stopped, and its output needs
            none: backprop ends above it.

    Args:
        shared: by all layers of a converted model. False: it belongs to one constructed layer that
            :func:`neq_kernels.convert` has not adopted, and sees no other layer's output.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.waiting: dict[int, Parameter] = {}
        # Which channels belong to which parameter, should a tool build its layer anew.
        self.channels_of: Any = WeakIdKeyDictionary()
        self.stopped = False
        self.optimizers: WeakSet[Attached] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterAnchor:
        return ParameterAnchor(shared=self.shared)

    def __reduce__(self) -> tuple[type[ParameterAnchor], tuple[bool]]:
        return ParameterAnchor, (self.shared,)

    def add(self, parameters: Iterable[Parameter]) -> None:
        """Let these parameters wait for the next live output.

        Raises:
            RuntimeError: there can be none, since the anchor is not shared.
        """
        waiting = {id(p): p for p in parameters if p.requires_grad}
        if waiting and not self.shared:
            raise RuntimeError(
                "a layer constructed from neq.nn is wholly frozen under a process group: expected "
                "a layer that convert has adopted, got one on its own, whose parameters a "
                "data-parallel reducer would wait for; call neq.convert(model) before wrapping it"
            )
        self.waiting.update(waiting)

    def add_stand_ins(self, frozen: Collection[Parameter]) -> None:
        """Let a parameter of each attached optimizer wait of which nothing learns.

        Args:
            frozen: those of the wholly frozen layer that asks.
        """
        for optimizer in self.optimizers:
            parameter = optimizer.stand_in(frozen)
            if parameter is not None:
                self.waiting[id(parameter)] = parameter

    def tie(self, output: Tensor) -> Tensor:
        """``output``, tied to the waiting parameters if it needs a gradient."""
        if not self.waiting or not output.requires_grad:
            return output
        anchored: Tensor = _Anchor.apply(output, *self.waiting.values())
        self.waiting.clear()
        return anchored


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        # Marked as modified rather than returned as a view: in-place activations must follow.
        ctx.mark_dirty(output)
        ctx.parameters = parameters  # for their formats alone: what they hold may change
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, *map(torch.zeros_like, ctx.parameters)
