"""The C++ extension's leaf ops, for CPU tensors: what ``backends.aten`` does, and own kernels.

``NEQ_KERNELS_LIBRARY`` names another build of the extension to load (the sanitizer tests do).
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from neq_kernels.backends import aten
from neq_kernels.channels import NeuronLayout
from neq_kernels.problem import ConvGeometry, Problem, Strategy

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_LIBRARY"
_LIBRARY = Path(__file__).parent.parent / "_C.so"

_FUSED_DTYPES = (torch.float32, torch.float64)

_leaf = torch.ops.neq_kernels_cpu
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


@functools.cache
def unavailable() -> str | None:
    """None when the extension is loaded, else why it is not."""
    library = os.environ.get(ENVIRONMENT_VARIABLE)
    if library is None and not _LIBRARY.exists():
        return "the C++ extension was not built when neq_kernels was installed"
    try:
        torch.ops.load_library(library or str(_LIBRARY))
    except OSError as error:
        return f"the C++ extension cannot be loaded: {error}"
    return None


def capability() -> str:
    """The instruction set in use: ``"default"``, ``"avx2"`` or ``"avx512"``."""
    name: str = _leaf.capability()
    return name


def strategies(problem: Problem) -> tuple[Strategy, ...]:
    """The strategies that can serve."""
    if problem.is_depthwise:
        return Strategy.DENSE, Strategy.PACK, Strategy.FUSED
    usable = list(aten.strategies(problem))
    if (problem.geometry is None or problem.is_plain_conv2d) and problem.dtype in _FUSED_DTYPES:
        usable.append(Strategy.FUSED)
    return tuple(usable)


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
) -> _Grads:
    """``aten.linear_backward``; what there is to save, in one call."""
    saves = 0 < n < len(order) and (wanted[1] or wanted[2])
    if not saves or not weight.is_contiguous():
        return aten.linear_backward(
            grad_output,
            input,
            input_size,
            weight,
            order,
            n,
            start,
            wanted,
            Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
            sys.modules[__name__],
        )
    grads: _Grads = _leaf.linear_backward.default(
        grad_output,
        grad_output if input is None else input,
        input_size,
        weight,
        order,
        n,
        start,
        *wanted,
        strategy.value,  # an IntEnum takes the slow way into the dispatcher
    )
    return grads


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    wanted: Sequence[bool],
    strategy: Strategy,
) -> _Grads:
    """``aten.conv_backward``; what there is to save, in one call."""
    saves = n < len(order) or strategy != Strategy.DENSE
    saves = saves and n > 0 and (wanted[1] or wanted[2])
    plain = geometry.groups == 1 or strategy == Strategy.FUSED
    if not saves or not plain or geometry.layout.blocks(weight) is None:
        return aten.conv_backward(
            grad_output,
            input,
            weight,
            geometry,
            order,
            n,
            wanted,
            Strategy.DENSE if strategy == Strategy.DENSE else Strategy.PACK,
            sys.modules[__name__],
        )
    grads: _Grads = _leaf.conv_backward.default(
        grad_output,
        input,
        weight,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        order,
        n,
        *wanted,
        strategy.value,
    )
    return grads


def pack(t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
    """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format.

    Raises:
        ValueError: an index, ``n`` or ``dim`` out of range, ``order`` no int64 vector, or a tensor
            that is not on the CPU.
    """
    packed: Tensor = _leaf.pack(t, order, n, dim)
    return packed


def scatter_rows(rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout) -> Tensor:
    """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0.

    Args:
        rows: as ``like`` but with n neurons, or, for ``layout.groups > 1``, ``layout.gather``'s
            shape; any floating dtype and strides.
        like: gives shape, strides and dtype.
        order: int64[K], every neuron once.

    Raises:
        ValueError: ``order`` is no permutation, or a shape or dtype that does not fit.
    """
    blocks = layout.blocks(like)
    if blocks is None:
        dense = like.new_empty(like.shape)
        return torch.empty_like(like).copy_(scatter_rows(rows, dense, order, n, layout))
    scattered: Tensor = _leaf.scatter_rows(rows, like, order, n, *blocks)
    return scattered


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """float64 ``[3, K]``: sums of ``a*b``, ``a*a``, ``b*b`` over every dimension but ``dim``.

    The bits do not depend on the number of threads.
    """
    sums: Tensor = _leaf.channel_similarity(a, b, dim)
    return sums


def depthwise_wgrad(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    order: Tensor,
    n: int,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Weight rows and bias entries of channels ``order[:n]`` of a 2d depthwise convolution.

    Args:
        grad_output: ``[N, K, P, Q]``, K a multiple of Cin; any strides, NCHW and channels_last are
            served without a copy.
        input: ``[N, Cin, H, W]`` of the same dtype (half types are summed in float32).
        weight_shape: ``(K, 1, kH, kW)``.
        stride, padding, dilation: two integers each.
        order: int64, its first ``n`` entries in [0, K).

    Returns:
        ``rows [n, 1, kH, kW]`` and ``bias [n]`` (empty unless ``want_bias``), of ``input``'s dtype.
        The bits do not depend on the number of threads. NaN and Inf of an inactive channel are
        never read into another channel's sums; Inf in an active channel's own input may turn
        neighbouring taps of that channel into NaN.

    Raises:
        ValueError: shapes, dtypes or indices that do not fit.
    """
    wgrad: tuple[Tensor, Tensor] = _leaf.depthwise_wgrad(
        grad_output, input, weight_shape, stride, padding, dilation, order, n, want_bias
    )
    return wgrad


def sgd_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    orders: Sequence[Tensor],
    n: Sequence[int],
    blocks: Sequence[int],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """``optim.rows.sgd_rows_`` of many parameters at once: dense CPU tensors, all of one dtype,
    each parameter's own of equal strides.

    Args:
        momentum_buffers, steps: one per parameter, or none at all.
        blocks: ``layout.blocks(param)`` of all parameters, one after the other.

    Raises:
        ValueError: anything else, or a bad order; nothing has been written then.
    """
    _leaf.sgd_rows_.default(
        params,
        grads,
        momentum_buffers,
        steps,
        orders,
        n,
        blocks,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
    )
    _count_write(params, momentum_buffers, steps)


def adam_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    orders: Sequence[Tensor],
    n: Sequence[int],
    blocks: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """``optim.rows.adam_rows_`` of many parameters at once: dense CPU tensors, all of one dtype,
    each parameter's own of equal strides.

    Args:
        max_exp_avg_sqs: one per parameter, or none at all.
        blocks: ``layout.blocks(param)`` of all parameters, one after the other.

    Raises:
        ValueError: anything else, or a bad order; nothing has been written then.
    """
    _leaf.adam_rows_.default(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        orders,
        n,
        blocks,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        maximize,
    )
    _count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


def _count_write(*tensors: Sequence[Tensor]) -> None:
    # The leaf ops write behind autograd's back; it must see that saved tensors went stale.
    torch.autograd.graph.increment_version(list(itertools.chain(*tensors)))
