"""The C++ extension's leaf ops, for CPU tensors: what ``backends.aten`` does, and own kernels.

``NEQ_KERNELS_LIBRARY`` names another build of the extension to load (the sanitizer tests do).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from neq_kernels.backends import aten
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.channels import NeuronLayout

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_LIBRARY"
_LIBRARY = Path(__file__).parent.parent / "_C.so"

_CUSTOM_DTYPES = (torch.float32, torch.float64)

_leaf = torch.ops.neq_kernels_cpu
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
Call = Callable[[Tensor, Tensor | None, Tensor, Sequence[bool]], _Grads]


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
    usable = aten.strategies(problem)
    is_plain = problem.geometry is None or problem.is_plain_conv2d
    if problem.is_depthwise or (is_plain and problem.dtype in _CUSTOM_DTYPES):
        return *usable, Strategy.CUSTOM
    return usable


def linear_call(
    weight: Tensor, order: Tensor, n: int, start: int, strategy: Strategy
) -> Call | None:
    """Computes the gradients of a linear layer in one call of the extension; None where it cannot.

    ``call(grad_output, input, weight, wanted)``: ``input`` may be None where the weight's gradient
    is not wanted. ``order`` is read when the call is made.
    """
    if not weight.is_contiguous():
        return None
    leaf, numbers = _leaf.linear_backward.default, _numbers(strategy.value, n, start)

    def call(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> _Grads:
        x = grad_output if input is None else input
        grads: _Grads = leaf(
            grad_output, x, weight, order, numbers, wanted[0], wanted[1], wanted[2]
        )
        return grads

    return call


def conv_call(
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    strategy: Strategy,
) -> Call | None:
    """Computes the gradients of a convolution in one call of the extension; None where it cannot.

    As :func:`linear_call`.
    """
    plain = geometry.groups == 1 or strategy == Strategy.CUSTOM or n == 0
    if not plain or geometry.layout.blocks(weight) is None:
        return None
    leaf, numbers = _leaf.conv_backward.default, _numbers(strategy.value, n, *_flat(geometry))

    def call(
        grad_output: Tensor, input: Tensor | None, weight: Tensor, wanted: Sequence[bool]
    ) -> _Grads:
        # Where only the input's shape matters, nothing is allocated for it.
        x = grad_output.new_empty(1).expand(input_size) if input is None else input
        if wanted[2] and not wanted[1] and geometry.groups > 1:  # the bias alone
            return aten.conv_backward(
                grad_output,
                x,
                weight,
                geometry,
                order,
                n,
                wanted[:3],
                Strategy.PACK,
                sys.modules[__name__],
            )
        dx, dw, db = leaf(grad_output, x, weight, order, numbers, wanted[0], wanted[1], wanted[2])
        if dw is not None and dw.stride() != weight.stride():  # the library's own
            dw = torch.empty_like(weight).copy_(dw)
        return dx, dw, db

    return call


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
    call = linear_call(weight, order, n, start, strategy) if saves else None
    if call is not None:
        return call(grad_output, input, weight, wanted)
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
    call = conv_call(input.shape, weight, geometry, order, n, strategy) if saves else None
    if call is not None:
        return call(grad_output, input, weight, wanted)
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


def _flat(geometry: ConvGeometry) -> tuple[int, ...]:
    g = geometry
    return g.groups, int(g.transposed), *g.stride, *g.padding, *g.dilation, *g.output_padding


@functools.lru_cache(maxsize=8192)
def _numbers(*numbers: int) -> Tensor:
    """Numbers for the extension: one tensor is read faster than many arguments."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def pack(t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
    """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format.

    Raises:
        ValueError: an index, ``n`` or ``dim`` out of range, ``order`` no int64 vector, or a tensor
            that is not on the CPU.
    """
    packed: Tensor = _leaf.pack(t, order, n, dim)
    return packed


def pack_and_sum(t: Tensor, order: Tensor, n: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """``pack``; sums are left to the library."""
    return pack(t, order, n, dim), None


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
    aten.count_write(params, momentum_buffers, steps)


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
    aten.count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
