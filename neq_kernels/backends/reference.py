"""The oracle: the dense gradient, then zeros over the frozen neurons. It defines correctness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend, Grads, in_layout_of, shape_only
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import Active


class Reference(Backend):
    """PyTorch's dense gradients on any device, whatever the strategy."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def supports(self, device_type: str) -> bool:
        return True

    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        return (Strategy.DENSE,)

    def linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        k, c = weight.shape
        frozen = active.order[active.n :]
        dy = grad_output.reshape(-1, k)
        grad_input = grad_weight = grad_bias = None
        if output_mask[0]:
            grad_input = (dy @ weight).reshape(input_size)
        if output_mask[1]:
            assert input is not None or active.n == 0
            if input is None:
                grad_weight = torch.zeros_like(weight)
            else:
                grad_weight = (dy.t() @ input.reshape(len(dy), c)).index_fill(0, frozen, 0)
        if output_mask[2]:
            grad_bias = dy.sum(0).index_fill(0, frozen, 0)
        return grad_input, in_layout_of(weight, grad_weight), grad_bias

    def conv_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        frozen = active.order[active.n :]
        x = grad_output.new_zeros(input_size) if input is None else input
        grad_input = grad_weight = grad_bias = None
        if output_mask[0]:
            grad_input, _, _ = geometry.backward(grad_output, x, weight, (True, False, False))
        if output_mask[1]:
            _, dense, _ = geometry.backward(grad_output, x, weight, (False, True, False))
            assert dense is not None
            grad_weight = dense.clone()
            geometry.layout.fill_(grad_weight, frozen, 0)
        if output_mask[2]:
            _, _, dense = geometry.backward(grad_output, x, weight, (False, False, True))
            assert dense is not None
            grad_bias = dense.index_fill(0, frozen, 0)
        return grad_input, in_layout_of(weight, grad_weight), grad_bias

    def linear_active_dgrad(
        self, grad_output: Tensor, weight: Tensor, input_size: Sequence[int], active: Active
    ) -> Tensor:
        dy = grad_output.reshape(-1, len(weight))
        return (dy.index_fill(1, active.order[active.n :], 0) @ weight).reshape(input_size)

    def conv_active_dgrad(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
    ) -> Tensor | None:
        masked = grad_output.index_fill(1, active.order[active.n :], 0)
        x = shape_only(grad_output, input, input_size)
        return geometry.backward(masked, x, weight, (True, False, False))[0]

    def channel_similarity(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = (t.detach().movedim(dim, 0).unsqueeze(-1).flatten(1).double() for t in (a, b))
        return torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
