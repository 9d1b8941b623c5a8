"""Convolutions, masks and memory formats for the tests of the ops, and how to run the ops."""

from __future__ import annotations

import torch

from tests.support import oracle
from tests.support.oracle import Conv

ALL = (True, True, True)

MASKS = {
    "none": lambda k: [False] * k,
    "one": lambda k: [i == k // 2 for i in range(k)],
    "all": lambda k: [True] * k,
    "run": lambda k: [k // 4 <= i < max(k // 4 + 1, 3 * k // 4) for i in range(k)],
    "ragged": oracle.ragged,
    "all but one": lambda k: [i != k // 2 for i in range(k)],
}


def selection(mask):
    """order, count, host_count of a mask, given as a list of bool."""
    if isinstance(mask, tuple):
        return mask
    channels = oracle.channels_with(mask)
    return channels.order(), channels.count(), channels.host_count


def run_linear(x, weight, dy, mask, wanted=ALL, active_dgrad=False):
    size = dy.shape[:-1] + weight.shape[1:]
    operator = torch.ops.neq_kernels.linear_backward
    return operator(dy, x, size, weight, *selection(mask), list(wanted), active_dgrad)


def run_conv(case, x, weight, dy, mask, wanted=ALL, active_dgrad=False, input_size=None):
    return torch.ops.neq_kernels.conv_backward(
        dy,
        x,
        list(x.shape if input_size is None else input_size),
        weight,
        *case.geometry(),
        *selection(mask),
        list(wanted),
        active_dgrad,
    )


def assert_conv_equals(case, grads, expected, mask):
    """Exact values, exact zeros, nothing else."""
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.shape == exact.shape
        assert torch.equal(grad.double(), exact)
    oracle.assert_frozen_are_zero(grads[1], mask, **case.layout)
    oracle.assert_frozen_are_zero(grads[2], mask)


CONVS = {
    "1d": Conv((3,), 4, 6, padding=(1,)),
    "pointwise": Conv((1, 1), 5, 8),
    "plain": Conv((3, 3), 4, 7, padding=(1, 1)),
    "strided and dilated": Conv((3, 2), 3, 6, stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    "grouped": Conv((3, 3), 3, 4, groups=3, padding=(1, 1)),
    "depthwise": Conv((3, 3), 1, 1, groups=8, padding=(1, 1)),
    "depthwise with multiplier": Conv((3, 3), 1, 2, groups=5, stride=(2, 2)),
    "3d": Conv((2, 3, 1), 3, 5, stride=(1, 2, 1), padding=(0, 1, 0)),
    "transposed 1d": Conv((4,), 3, 6, stride=(2,), transposed=True),
    "transposed": Conv(
        (3, 3), 4, 6, stride=(2, 2), padding=(1, 1), output_padding=(1, 0), transposed=True
    ),
    "transposed grouped": Conv(
        (3, 2), 2, 3, groups=3, stride=(2, 1), dilation=(1, 2), transposed=True
    ),
    "transposed depthwise": Conv((2, 2), 1, 1, groups=6, stride=(2, 2), transposed=True),
    "transposed 3d": Conv((2, 2, 2), 2, 5, stride=(2, 1, 1), transposed=True),
}
FORMATS = {
    1: ["contiguous"],
    2: ["contiguous", "channels_last"],
    3: ["contiguous", "channels_last"],
}


def in_format(tensor, name):
    """``tensor`` in one of the layouts a user's tensors come in."""
    if name == "channels_last" and tensor.dim() in (4, 5):
        which = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=which)
    if name == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 99.0, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if name == "permuted":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


def conv_tensors(case, *, batch=2, size=6, make=oracle.small_integers, dtype=torch.float64):
    """x, weight and dY of fitting shapes."""
    x = make((batch, case.c, *(size + i for i in range(len(case.kernel))))).to(dtype)
    weight = make(case.weight_shape).to(dtype)
    out = case.forward(x.double(), weight.double())
    return x, weight, make(out.shape).to(dtype)


WIDER = {
    "plain": Conv((3, 3), 16, 24, padding=(1, 1)),
    "pointwise": Conv((1, 1), 32, 40),
    "pointwise grouped": Conv((1, 1), 16, 16, groups=2),
    "grouped": Conv((3, 3), 8, 8, groups=4, padding=(1, 1)),
    "depthwise": Conv((3, 3), 1, 1, groups=24, padding=(1, 1)),
    "1d": Conv((5,), 12, 20, stride=(2,)),
    "transposed": Conv((3, 3), 16, 12, stride=(2, 2), transposed=True),
}
