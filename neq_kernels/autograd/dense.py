"""Gradients of any order by PyTorch's own operators, with frozen neurons as constants.

Slower than the kernels, and right wherever PyTorch has to see what is computed: second derivatives,
forward-mode AD, function transforms, and tensors that no kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels.backends.base import Grads, shape_only
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import NeuronLayout
from neq_kernels.sharding import is_distributed, replicated_like

ROWS = NeuronLayout()


def constant_where_frozen(parameter: Tensor, mask: Tensor, layout: NeuronLayout = ROWS) -> Tensor:
    """``parameter``, through which only active neurons get a gradient.

    Args:
        mask: bool[K] on the parameter's device, True where active.
        layout: where a neuron lies in ``parameter``.
    """
    where = layout.spread(mask, parameter)
    if is_distributed(parameter):
        where = replicated_like(parameter, where)
    return torch.where(where, parameter, parameter.detach())


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    mask: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of a linear layer that can be differentiated again.

    Args:
        mask: bool[K], True where active.
        The others are those of ``torch.ops.neq_kernels.linear_backward``.
    """
    grad_output = grad_output.reshape(-1, weight.shape[0])
    active_output = torch.where(mask, grad_output, 0)
    dx = dw = db = None
    if output_mask[0]:
        from_outputs = active_output if active_dgrad else grad_output
        dx = (from_outputs @ constant_where_frozen(weight, mask)).reshape(input_size)
    if output_mask[1]:
        assert input is not None
        rows = grad_output.t() @ input.reshape(-1, weight.shape[1])
        dw = torch.where(ROWS.spread(mask, rows), rows, 0)
    if output_mask[2]:
        db = torch.where(mask, grad_output.sum(0), 0)
    return dx, dw, db


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    mask: Tensor,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """As :func:`linear_backward`, for a convolution of batched images."""
    layout = geometry.layout
    constant = constant_where_frozen(weight, mask, layout)
    x = shape_only(grad_output, input, input_size)
    dx = None
    if active_dgrad and output_mask[0]:
        channels = NeuronLayout(axis=1).spread(mask, grad_output)
        from_outputs = torch.where(channels, grad_output, 0)
        dx, _, _ = geometry.backward(from_outputs, x, constant, (True, False, False))
        output_mask = (False, *output_mask[1:])
    dense_dx, dw, db = geometry.backward(grad_output, x, constant, output_mask)
    return (
        dense_dx if dx is None else dx,
        None if dw is None else torch.where(layout.spread(mask, dw), dw, 0),
        None if db is None else torch.where(mask, db, 0),
    )
