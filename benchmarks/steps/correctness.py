"""The gate before every stopwatch: do the providers compute the dense gradients?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tolerance:
    """What may differ from the dense step: the error of a wrong row is of order 1.

    Attributes:
        loss: relative.
        gradient: of the largest value of a parameter's gradient.
        least_scale: gradients that are 0 but for rounding (a bias before a norm) are held to this
            share of the model's largest one.
    """

    loss: float
    gradient: float
    least_scale: float


FLOAT32 = Tolerance(loss=1e-5, gradient=5e-4, least_scale=1e-4)  # sums in another order
_BFLOAT16_STEP = torch.finfo(torch.bfloat16).eps
# Every gradient is rounded, and what comes down to a layer was rounded in each layer above it.
BFLOAT16 = Tolerance(loss=_BFLOAT16_STEP / 4, gradient=4 * _BFLOAT16_STEP, least_scale=1e-2)


def differences(
    models: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    dense: str = "dense",
    tolerance: Tolerance = FLOAT32,
) -> dict[str, str]:
    """What is wrong, by model; empty when everything is right.

    Every model must have the loss of ``models[dense]``, in active rows (and in parameters of no
    layer in ``masks``) its gradient, in frozen rows a gradient of 0, or none. Gradients are cleared
    afterwards.

    Args:
        models: equal weights, masks set.
        masks: layer name to active indices.
        tolerance: ``BFLOAT16`` under autocast.
    """
    results = {name: _loss_and_gradients(model, batch, loss) for name, model in models.items()}
    reference = results.pop(dense)
    found = {
        name: _difference(*result, *reference, masks, tolerance) for name, result in results.items()
    }
    return {name: text for name, text in found.items() if text}


def _loss_and_gradients(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]
) -> tuple[float, dict[str, Tensor | None]]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    value = loss(model, batch)
    value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return value.item(), gradients


def _difference(
    value: float,
    gradients: Mapping[str, Tensor | None],
    dense_value: float,
    dense: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> str:
    if not abs(value - dense_value) <= tolerance.loss * abs(dense_value):
        return f"loss {value:g}, dense {dense_value:g}"
    largest = max(float(g.abs().max()) for g in dense.values() if g is not None)
    for name, want in dense.items():
        if want is None:
            continue
        active = masks.get(name.rpartition(".")[0])
        text = _wrong(gradients[name], want, active, tolerance.least_scale * largest, tolerance)
        if text:
            return f"{name}: {text}"
    return ""


def _wrong(
    got: Tensor | None,
    want: Tensor,
    active: Tensor | None,
    least_scale: float,
    tolerance: Tolerance,
) -> str:
    frozen = torch.ones(len(want), dtype=torch.bool)
    frozen[slice(None) if active is None else active] = False
    if got is None:
        # A parameter of no layer stops with everything above it.
        return "" if active is None or bool(frozen.all()) else "no gradient"
    if bool((got[frozen] != 0).any()):
        return "a frozen row has a gradient"
    scale = max(float(want.abs().max()), least_scale)
    error = float((got - want)[~frozen].abs().max()) / scale if not frozen.all() else 0.0
    return "" if error <= tolerance.gradient else f"off by {error:.1e} of its largest value"
