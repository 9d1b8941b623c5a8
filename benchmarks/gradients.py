"""The gate before every stopwatch: do the providers compute the dense gradients?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LOSS_TOLERANCE = 1e-5
# float32 sums in another order; the error of a wrong row is of order 1.
GRADIENT_TOLERANCE = 5e-4
# Gradients that are 0 but for rounding (a bias before a norm) are held to the model's largest one.
LEAST_SCALE = 1e-4


def differences(
    models: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    dense: str = "dense",
) -> dict[str, str]:
    """What is wrong, by model; empty when everything is right.

    Every model must have the loss of ``models[dense]``, in active rows (and in parameters of no
    layer in ``masks``) its gradient, in frozen rows a gradient of 0, or none. Gradients are cleared
    afterwards.

    Args:
        models: equal weights, masks set.
        masks: layer name to active indices.
    """
    results = {name: _loss_and_gradients(model, batch, loss) for name, model in models.items()}
    reference = results.pop(dense)
    found = {name: _difference(*result, *reference, masks) for name, result in results.items()}
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
) -> str:
    if not abs(value - dense_value) <= LOSS_TOLERANCE * abs(dense_value):
        return f"loss {value:g}, dense {dense_value:g}"
    largest = max(float(g.abs().max()) for g in dense.values() if g is not None)
    for name, want in dense.items():
        if want is None:
            continue
        active = masks.get(name.rpartition(".")[0])
        text = _wrong(gradients[name], want, active, LEAST_SCALE * largest)
        if text:
            return f"{name}: {text}"
    return ""


def _wrong(got: Tensor | None, want: Tensor, active: Tensor | None, least_scale: float) -> str:
    frozen = torch.ones(len(want), dtype=torch.bool)
    frozen[slice(None) if active is None else active] = False
    if got is None:
        # A parameter of no layer stops with everything above it.
        return "" if active is None or bool(frozen.all()) else "no gradient"
    if bool((got[frozen] != 0).any()):
        return "a frozen row has a gradient"
    scale = max(float(want.abs().max()), least_scale)
    error = float((got - want)[~frozen].abs().max()) / scale if not frozen.all() else 0.0
    return "" if error <= GRADIENT_TOLERANCE else f"off by {error:.1e} of its largest value"
