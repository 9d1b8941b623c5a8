"""The oracle: the dense gradient, then zeros over the frozen neurons. It defines correctness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry


def unavailable() -> str | None:
    """The oracle runs on every device that torch runs on."""
    return None


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    n_active: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    k, c = weight.shape
    frozen = order[n_active:]
    dy = grad_output.reshape(-1, k)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        propagated = dy.index_fill(1, frozen, 0) if active_dgrad else dy
        grad_input = (propagated @ weight).reshape(input_size)
    if output_mask[1]:
        assert input is not None or n_active == 0
        if input is None:
            grad_weight = torch.zeros_like(weight)
        else:
            grad_weight = (dy.t() @ input.reshape(len(dy), c)).index_fill(0, frozen, 0)
    if output_mask[2]:
        grad_bias = dy.sum(0).index_fill(0, frozen, 0)
    return grad_input, grad_weight, grad_bias


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n_active: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    frozen = order[n_active:]
    x = grad_output.new_zeros(input_size) if input is None else input
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        propagated = grad_output.index_fill(1, frozen, 0) if active_dgrad else grad_output
        grad_input, _, _ = geometry.backward(propagated, x, weight, (True, False, False))
    if output_mask[1]:
        _, dense, _ = geometry.backward(grad_output, x, weight, (False, True, False))
        assert dense is not None
        grad_weight = dense.clone()
        geometry.layout.fill_(grad_weight, frozen, 0)
    if output_mask[2]:
        _, _, dense = geometry.backward(grad_output, x, weight, (False, False, True))
        assert dense is not None
        grad_bias = dense.index_fill(0, frozen, 0)
    return grad_input, grad_weight, grad_bias


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = (t.detach().movedim(dim, 0).unsqueeze(-1).flatten(1).double() for t in (a, b))
    return torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
