"""Keep parameters of wholly frozen layers visible to a data-parallel reducer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary


class ParameterAnchor:
    """Parameters of wholly frozen layers that the forward has passed without a graph.

    DistributedDataParallel waits for every parameter in every backward. The next output that does
    need a gradient takes the waiting parameters along as extra inputs of a Function that returns
    None for them; the reducer then sees them and fills their gradient with zeros.

    Args:
        shared: by all layers of a converted model. False: it belongs to one constructed layer that
            :func:`neq_kernels.convert` has not adopted, and sees no other layer's output.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.waiting: dict[int, Parameter] = {}
        # Which channels belong to which parameter, should a tool build its layer anew.
        self.channels_of: Any = WeakIdKeyDictionary()

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
        ctx.n_parameters = len(parameters)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, *(None,) * ctx.n_parameters
