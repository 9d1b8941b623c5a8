"""Weight gradients to measure: those of a model, with operands of their shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neq_kernels.backends.problem import ConvGeometry, Problem
from neq_kernels.measure.products import CONVOLUTIONS
from neq_kernels.measure.recorder import LayerCall, Recorder


def problems_of(model: nn.Module, *inputs: Any) -> dict[str, Problem]:
    """The weight gradients of one backward, by layer, for a forward of ``inputs``; a single dict
    holds keyword arguments.

    Linear layers and convolutions that are not transposed, with padding given in numbers. A layer
    that is called more than once counts with its last call. The model may be on ``meta``.
    """
    found: dict[str, Problem] = {}

    def note(
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        _: Any,
    ) -> None:
        if func is F.linear:
            x, weight = (*args, *kwargs.values())[:2]
            found[call.name] = Problem.linear(x.numel() // max(1, x.shape[-1]), weight)
        elif func in CONVOLUTIONS:
            problem = _conv(*args, **kwargs)
            if problem is not None:
                found[call.name] = problem

    keywords = len(inputs) == 1 and isinstance(inputs[0], Mapping)
    with torch.no_grad(), Recorder(model, on_call=note).watching(*inputs):
        if keywords:
            model(**inputs[0])
        else:
            model(*inputs)
    return found


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Problem | None:
    if isinstance(padding, str):
        return None
    spatial = weight.dim() - 2

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * spatial if isinstance(value, int) else tuple(value)

    geometry = ConvGeometry(
        each(stride), each(padding), each(dilation), False, (0,) * spatial, groups
    )
    return Problem.conv(input, weight, geometry)
