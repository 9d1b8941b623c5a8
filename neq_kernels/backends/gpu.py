"""What the backends for GPUs have in common: the library's part of a backward, and who does what of
the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neq_kernels.backends import aten
from neq_kernels.problem import ConvGeometry, Strategy

# Of grad_output, input, count: the gradients of weight and bias.
OwnWgrad = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    n: int,
    start: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    count: Tensor | None,
    primitives: aten.Primitives,
    own_wgrad: OwnWgrad,
) -> aten.Grads:
    """``aten.linear_backward``; the weight's gradient by ``own_wgrad``, of matrices, where the
    strategy is ``FUSED``.

    Args:
        count: int32[1] on the device, for the own kernel to read n from; None makes one.
    """
    fused = strategy == Strategy.FUSED and wanted[1] and n > 0 and grad_output.numel() > 0
    grads = aten.linear_backward(
        grad_output,
        input,
        input_size,
        weight,
        order,
        n,
        start,
        (wanted[0], False, False) if fused else wanted,
        Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
        primitives,
    )
    if not fused:
        return grads
    assert input is not None
    dy = grad_output.reshape(-1, len(order))
    x = input.reshape(len(dy), -1)
    return grads[0], *own_wgrad(dy, x, count_of(n, weight.device) if count is None else count)


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    wanted: Sequence[bool],
    strategy: Strategy,
    count: Tensor | None,
    primitives: aten.Primitives,
    own_wgrad: OwnWgrad,
) -> aten.Grads:
    """``aten.conv_backward``; as :func:`linear_backward`."""
    fused = strategy == Strategy.FUSED and wanted[1] and n > 0 and grad_output.numel() > 0
    grads = aten.conv_backward(
        grad_output,
        input,
        weight,
        geometry,
        order,
        n,
        (wanted[0], False, False) if fused else wanted,
        Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
        primitives,
    )
    if not fused:
        return grads
    count = count_of(n, weight.device) if count is None else count
    return grads[0], *own_wgrad(grad_output, input, count)


@functools.lru_cache(maxsize=8192)
def count_of(n: int, device: torch.device) -> Tensor:
    """int32[1] on the device: n."""
    with torch.inference_mode(False):
        return torch.tensor([n], dtype=torch.int32, device=device)
