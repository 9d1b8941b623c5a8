"""Who computes a gradient, and how: the choice of backend and of wgrad strategy."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from neq_kernels.backends import aten, cpu, reference
from neq_kernels.backends.geometry import ConvGeometry
from neq_kernels.channels import NeuronLayout

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_BACKEND"
_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "aten": aten, "reference": reference}
_AUTOMATIC = {"cpu": ("cpu", "aten")}
_ROWS = NeuronLayout()

# Above this share of active channels gathering costs more than the rows it saves.
_DENSE_SHARE = 0.85

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def backends() -> list[tuple[str, str | None]]:
    """Every backend with None when it can be used, else the reason why not."""
    return [(name, module.unavailable()) for name, module in _BACKENDS.items()]


@functools.cache
def backend_for(device_type: str) -> str:
    """The backend that serves tensors of this device type.

    Raises:
        ValueError: ``NEQ_KERNELS_BACKEND`` names no backend.
        RuntimeError: it names one that cannot be used here.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        if forced not in _BACKENDS:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: expected one of {sorted(_BACKENDS)}, got {forced!r}"
            )
        reason = _BACKENDS[forced].unavailable()
        if reason is None and forced == "cpu" and device_type != "cpu":
            reason = f"it serves CPU tensors, got {device_type}"
        if reason is not None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}: {reason}")
        return forced
    for name in _AUTOMATIC.get(device_type, ("aten",)):
        reason = _BACKENDS[name].unavailable()
        if reason is None:
            return name
        logger.warning("backend %s is not used for %s tensors: %s", name, device_type, reason)
    raise AssertionError("aten is always available")


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    k = weight.shape[0]
    n, start = host_count.tolist()
    backend = backend_for(weight.device.type)
    if backend == "reference":
        return reference.linear_backward(
            grad_output, input, input_size, weight, order, n, output_mask, active_dgrad
        )
    primitives = _BACKENDS[backend]
    grad_input = None
    if output_mask[0]:
        if active_dgrad and n < k:
            grad_input = aten.linear_active_dgrad(
                grad_output, weight, input_size, order, n, primitives
            )
        else:
            grad_input = aten.linear_dgrad(grad_output, weight, input_size)
    want = (output_mask[1], output_mask[2])
    if not any(want):
        return grad_input, None, None
    if n == 0:
        return grad_input, *_zeros(weight, k, want)
    # Bias alone was wanted: the input was not saved and is not read.
    x = grad_output if input is None else input
    if n == k:
        return grad_input, *aten.linear_wgrad(grad_output, x, want)
    _refuse_capture(weight, "linear_backward")
    if n > _DENSE_SHARE * k:
        dense = aten.linear_wgrad(grad_output, x, want)
        return grad_input, *_overwrite_frozen(dense, _ROWS, order[n:])
    m, skipped = aten.rounded_up(n, k), 0
    if start >= 0:
        first = min(start, k - m)
        packed, skipped = grad_output.narrow(-1, first, m), start - first
    else:
        packed = primitives.pack(grad_output.reshape(-1, k), order, m, 1)
    weight_rows, bias_rows = (
        None if rows is None else rows.narrow(0, skipped, n)
        for rows in aten.linear_wgrad(packed, x, want)
    )
    return grad_input, *_scatter((weight_rows, bias_rows), weight, k, order, n, _ROWS, primitives)


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    host_count: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    k = grad_output.shape[1]
    n, _ = host_count.tolist()
    backend = backend_for(weight.device.type)
    if backend == "reference":
        return reference.conv_backward(
            grad_output, input, input_size, weight, geometry, order, n, output_mask, active_dgrad
        )
    # Where only the input's shape matters (dgrad alone), nothing is allocated for it.
    x = grad_output.new_empty(1).expand(input_size) if input is None else input
    want_dgrad, want = output_mask[0], (output_mask[1], output_mask[2])
    if n == k:
        return geometry.backward(grad_output, x, weight, output_mask)
    _refuse_capture(weight, "conv_backward")
    grad_input = None
    if want_dgrad and active_dgrad:
        masked = grad_output.index_fill(1, order[n:], 0)
        grad_input = geometry.backward(masked, x, weight, (True, False, False))[0]
        want_dgrad = False
    fused = backend == "cpu" and want[0] and _is_depthwise(input_size, weight, geometry)
    if n > 0 and any(want) and not fused and _prefers_dense(grad_output, geometry, n):
        dgrad, *dense = geometry.backward(grad_output, x, weight, (want_dgrad, *want))
        wgrad = _overwrite_frozen((dense[0], dense[1]), geometry.layout, order[n:])
        return (dgrad if want_dgrad else grad_input), *wgrad
    if want_dgrad:
        grad_input = geometry.backward(grad_output, x, weight, (True, False, False))[0]
    if not any(want):
        return grad_input, None, None
    if n == 0:
        return grad_input, *_zeros(weight, k, want)
    primitives = _BACKENDS[backend]
    rows: tuple[Tensor | None, Tensor | None]
    if fused:
        weight_rows, bias_rows = cpu.depthwise_wgrad(
            grad_output,
            x,
            weight.shape,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            order,
            n,
            want[1],
        )
        rows = (weight_rows, bias_rows if want[1] else None)
    else:
        grouped = geometry.groups > 1
        active_rows = aten.conv_active_rows_grouped if grouped else aten.conv_active_rows
        rows = active_rows(grad_output, x, weight, geometry, order, n, want, primitives)
    return grad_input, *_scatter(rows, weight, k, order, n, geometry.layout, primitives)


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    result: Tensor = _BACKENDS[backend_for(a.device.type)].channel_similarity(a, b, dim)
    return result


def _is_depthwise(input_size: Sequence[int], weight: Tensor, geometry: ConvGeometry) -> bool:
    """What the fused kernel serves; the library is slow there, packed or not."""
    return weight.dim() == 4 and not geometry.transposed and geometry.groups == input_size[1] > 1


def _prefers_dense(grad_output: Tensor, geometry: ConvGeometry, n: int) -> bool:
    if n > _DENSE_SHARE * grad_output.shape[1]:
        return True
    # Grouped: the ragged selection is made on the host, and the rows of a transposed weight are no
    # plain block.
    return geometry.groups > 1 and (geometry.transposed or grad_output.device.type != "cpu")


def _scatter(
    rows: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    k: int,
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    primitives: ModuleType,
) -> tuple[Tensor | None, Tensor | None]:
    weight_rows, bias_rows = rows
    return (
        None
        if weight_rows is None
        else primitives.scatter_rows(weight_rows, weight, order, n, layout),
        None
        if bias_rows is None
        else primitives.scatter_rows(bias_rows, weight.new_empty(k), order, n, _ROWS),
    )


def _zeros(weight: Tensor, k: int, want: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.zeros_like(weight) if want[0] else None,
        weight.new_zeros(k) if want[1] else None,
    )


def _overwrite_frozen(
    grads: tuple[Tensor | None, Tensor | None], layout: NeuronLayout, frozen: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    grad_weight, grad_bias = grads
    if grad_weight is not None:
        layout.fill_(grad_weight, frozen, 0)
    if grad_bias is not None:
        _ROWS.fill_(grad_bias, frozen, 0)
    return grad_weight, grad_bias


def _refuse_capture(weight: Tensor, op: str) -> None:
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: this backend cannot be captured in a CUDA graph while channels are frozen: "
            "the number of active channels would be baked into the graph"
        )
