"""SGD and Adam steps of the active neurons of many parameters, in one launch.

Numbers are computed in float32. A neuron's program alone reads and advances its step count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from neq_kernels.backends import aten
from neq_kernels.backends.triton import multi_tensor
from neq_kernels.backends.triton.multi_tensor import (
    advance,
    is_stretch,
    neurons_of_program,
    places,
    pointer,
)

_SGD_ADDRESSES, _ADAM_ADDRESSES = tl.constexpr(5), tl.constexpr(7)
_SERIES_TERMS = tl.constexpr(12)


@triton.jit
def sgd_update(
    tensors,
    offsets,
    exists,
    is_first,
    settings,
    ELEMENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    param, grad, buffer = tensors
    lr, momentum, grad_share, weight_decay, grad_sign = settings
    to_param = pointer(param, ELEMENT, ALIGNED) + offsets
    p = tl.load(to_param, mask=exists, other=0.0).to(tl.float32)
    g = tl.load(pointer(grad, ELEMENT, ALIGNED) + offsets, mask=exists, other=0.0).to(tl.float32)
    update = grad_sign * g + weight_decay * p
    if MOMENTUM:
        to_buffer = pointer(buffer, ELEMENT, ALIGNED) + offsets
        b = tl.load(to_buffer, mask=exists, other=0.0).to(tl.float32)
        b = tl.where(is_first, update, momentum * b + grad_share * update)
        tl.store(to_buffer, b.to(ELEMENT), mask=exists)
        update = update + momentum * b if NESTEROV else b
    tl.store(to_param, (p - lr * update).to(ELEMENT), mask=exists)


@triton.jit(do_not_specialize=["parameters"])
def sgd_kernel(
    addresses,
    shapes,
    parameters,
    lr,
    momentum,
    grad_share,
    weight_decay,
    grad_sign,
    ELEMENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COUNTED: tl.constexpr,
    NESTEROV: tl.constexpr,
    STRETCH: tl.constexpr,
    ACROSS: tl.constexpr,
):
    parameter, start, count, outer, per_group, inner = neurons_of_program(shapes, parameters)
    address = addresses + parameter * _SGD_ADDRESSES
    param, grad, buffer = tl.load(address), tl.load(address + 1), tl.load(address + 2)
    tensors = param, grad, buffer
    settings = lr, momentum, grad_share, weight_decay, grad_sign
    steps = pointer(tl.load(address + 3), tl.int64, False)
    order = pointer(tl.load(address + 4), tl.int64, False) + start
    if is_stretch(param | grad | buffer, count, outer, inner):
        neuron = tl.load(order)
        is_first = tl.load(steps + neuron) == 0 if COUNTED else False
        size = inner // 16 * 16
        for at in range(0, size, STRETCH):
            element = at + tl.arange(0, STRETCH)
            offsets = neuron * size + element
            sgd_update(
                tensors,
                offsets,
                element < size,
                is_first,
                settings,
                ELEMENT,
                MOMENTUM,
                NESTEROV,
                ALIGNED=True,
            )
    else:
        for at in range(0, outer * count * inner, ACROSS):
            neurons, offsets, exists = places(at, order, count, outer, per_group, inner, ACROSS)
            is_first = tl.load(steps + neurons, mask=exists, other=1) == 0 if COUNTED else False
            sgd_update(
                tensors,
                offsets,
                exists,
                is_first,
                settings,
                ELEMENT,
                MOMENTUM,
                NESTEROV,
                ALIGNED=False,
            )
    if COUNTED:
        advance(steps, order, count, ACROSS)


@triton.jit
def one_minus_power(log_beta, count):
    """``1 - beta**count``. Where that is small, by the series of exp: the difference would cancel
    all digits that float32 has."""
    x = log_beta * count.to(tl.float32)
    small = tl.maximum(x, -1.0)
    series = 1.0
    for i in tl.static_range(_SERIES_TERMS, 1, -1):
        series = 1.0 + small * (1.0 / i) * series
    return tl.where(x > -1.0, -small * series, 1.0 - tl.exp(x))


@triton.jit
def corrections(lr, log_beta1, log_beta2, before):
    """Step size, and what the root of the second moment is multiplied by, of neurons that have
    taken so many steps."""
    count = before + 1
    step_size = tl.div_rn(lr, one_minus_power(log_beta1, count))
    return step_size, tl.div_rn(1.0, tl.sqrt_rn(one_minus_power(log_beta2, count)))


@triton.jit
def adam_update(
    tensors,
    offsets,
    exists,
    step_size,
    root_scale,
    settings,
    ELEMENT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = tensors
    beta1, beta1_rest, beta2, beta2_rest, eps, weight_decay, decay_factor, grad_sign = settings
    to_param = pointer(param, ELEMENT, ALIGNED) + offsets
    to_m = pointer(exp_avg, ELEMENT, ALIGNED) + offsets
    to_v = pointer(exp_avg_sq, ELEMENT, ALIGNED) + offsets
    p = tl.load(to_param, mask=exists, other=0.0).to(tl.float32) * decay_factor
    g = tl.load(pointer(grad, ELEMENT, ALIGNED) + offsets, mask=exists, other=0.0).to(tl.float32)
    m = tl.load(to_m, mask=exists, other=0.0).to(tl.float32)
    v = tl.load(to_v, mask=exists, other=0.0).to(tl.float32)
    g = grad_sign * g + weight_decay * p
    # As torch.lerp: the rounding of what is small does not count.
    m = tl.where(beta1 > 0.5, m + beta1_rest * (g - m), g - beta1 * (g - m))
    v = v * beta2 + beta2_rest * g * g
    if AMSGRAD:
        to_largest = pointer(max_exp_avg_sq, ELEMENT, ALIGNED) + offsets
        largest = tl.load(to_largest, mask=exists, other=0.0).to(tl.float32)
    tl.store(to_m, m.to(ELEMENT), mask=exists)
    tl.store(to_v, v.to(ELEMENT), mask=exists)
    if AMSGRAD:
        v = tl.where(largest > v, largest, v)
        tl.store(to_largest, v.to(ELEMENT), mask=exists)
    denominator = tl.sqrt_rn(v) * root_scale + eps
    tl.store(to_param, (p - tl.div_rn(step_size * m, denominator)).to(ELEMENT), mask=exists)


@triton.jit(do_not_specialize=["parameters"])
def adam_kernel(
    addresses,
    shapes,
    parameters,
    lr,
    log_beta1,
    log_beta2,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    weight_decay,
    decay_factor,
    grad_sign,
    ELEMENT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STRETCH: tl.constexpr,
    ACROSS: tl.constexpr,
):
    parameter, start, count, outer, per_group, inner = neurons_of_program(shapes, parameters)
    address = addresses + parameter * _ADAM_ADDRESSES
    param, grad = tl.load(address), tl.load(address + 1)
    exp_avg, exp_avg_sq = tl.load(address + 2), tl.load(address + 3)
    max_exp_avg_sq = tl.load(address + 4)
    steps = pointer(tl.load(address + 5), tl.int64, False)
    order = pointer(tl.load(address + 6), tl.int64, False) + start
    tensors = param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq
    settings = beta1, beta1_rest, beta2, beta2_rest, eps, weight_decay, decay_factor, grad_sign
    together = param | grad | exp_avg | exp_avg_sq | max_exp_avg_sq
    if is_stretch(together, count, outer, inner):
        neuron = tl.load(order)
        step_size, root_scale = corrections(lr, log_beta1, log_beta2, tl.load(steps + neuron))
        size = inner // 16 * 16
        for at in range(0, size, STRETCH):
            element = at + tl.arange(0, STRETCH)
            adam_update(
                tensors,
                neuron * size + element,
                element < size,
                step_size,
                root_scale,
                settings,
                ELEMENT,
                AMSGRAD,
                ALIGNED=True,
            )
    else:
        for at in range(0, outer * count * inner, ACROSS):
            neurons, offsets, exists = places(at, order, count, outer, per_group, inner, ACROSS)
            before = tl.load(steps + neurons, mask=exists, other=0)
            step_size, root_scale = corrections(lr, log_beta1, log_beta2, before)
            adam_update(
                tensors,
                offsets,
                exists,
                step_size,
                root_scale,
                settings,
                ELEMENT,
                AMSGRAD,
                ALIGNED=False,
            )
    advance(steps, order, count, ACROSS)


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
    """``optim.reference.sgd_rows_`` of many parameters: see ``backends.base``."""
    with_momentum = len(momentum_buffers) > 0
    multi_tensor.launch(
        sgd_kernel,
        (params, grads, momentum_buffers, steps, orders),
        n,
        blocks,
        lr,
        momentum,
        1 - dampening,
        weight_decay,
        -1.0 if maximize else 1.0,
        MOMENTUM=with_momentum,
        COUNTED=with_momentum and len(steps) > 0,
        NESTEROV=bool(nesterov),
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
    """``optim.reference.adam_rows_`` of many parameters: see ``backends.base``."""
    multi_tensor.launch(
        adam_kernel,
        (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders),
        n,
        blocks,
        lr,
        _log(beta1),
        _log(beta2),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        0.0 if decoupled else weight_decay,
        1 - lr * weight_decay if decoupled else 1.0,
        -1.0 if maximize else 1.0,
        AMSGRAD=len(max_exp_avg_sqs) > 0,
    )
    aten.count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
