"""The ops as operators: schemas, fakes, autograd keys, FLOP formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.op_cases import (
    ALL,
    CONVS,
    FORMATS,
    MASKS,
    conv_tensors,
    in_format,
    run_conv,
    run_linear,
    selection,
)
from tests.support.oracle import Conv


@pytest.mark.parametrize("n", [0, 1, 5, 12, 23, 24])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("active_dgrad", [False, True])
def test_flop_formulas_count_active_rows(n, wanted, active_dgrad):
    """wgrad: 2 * (active neurons) * (reduction) * (weights of a neuron); dgrad: the same, all."""
    mask = [i < n for i in range(24)]

    def counted(run, *args):
        with FlopCounterMode(display=False) as counter:
            run(*args, mask, wanted, active_dgrad)
        return counter.get_total_flops()

    def expected(per_neuron):
        dgrad = per_neuron * (n if active_dgrad else 24) if wanted[0] else 0
        return dgrad + (per_neuron * n if wanted[1] else 0)

    x, weight, dy = torch.randn(6, 4, 33), torch.randn(24, 33), torch.randn(6, 4, 24)
    assert counted(run_linear, x, weight, dy) == expected(2 * 24 * 33)
    for case in (
        Conv((3, 3), 16, 24, stride=(2, 1), padding=(1, 1)),
        Conv((3, 3), 5, 6, groups=4, padding=(1, 1)),
        Conv((5,), 3, 24),
    ):
        x, weight, dy = conv_tensors(case, size=8)
        positions = dy[:, 0].numel()
        per_neuron = 2 * positions * weight[0].numel()
        assert counted(run_conv, case, x, weight, dy) == expected(per_neuron)
    case = Conv((3, 3), 5, 6, groups=4, stride=(2, 2), transposed=True)
    x, weight, dy = conv_tensors(case, size=5)
    per_neuron = 2 * x[:, 0].numel() * 5 * 9
    assert counted(run_conv, case, x, weight, dy) == expected(per_neuron)


def test_flops_of_everything_active_are_what_torch_counts():
    # PyTorch's formula forgets the groups of a convolution.
    for case in (c for c in CONVS.values() if c.groups == 1):
        x, weight, dy = conv_tensors(case)
        with FlopCounterMode(display=False) as ours:
            run_conv(case, x, weight, dy, [True] * case.k)
        theirs = FlopCounterMode(display=False)
        x.requires_grad_()
        weight.requires_grad_()
        out = case.forward(x, weight)
        with theirs:
            torch.autograd.grad(out, (x, weight), dy)
        assert ours.get_total_flops() == theirs.get_total_flops()


OPCHECKS = [
    ("ragged", ALL),
    ("ragged", (True, False, True)),
    ("none", ALL),
    ("all", (True, False, True)),
    ("all", (False, True, False)),
]


def opcheck_conv(case, fmt, mask, wanted, **options):
    x, weight, dy = conv_tensors(case, make=torch.randn, dtype=torch.float32)
    x, weight, dy = (in_format(t, fmt) for t in (x, weight, dy))
    chosen = selection(MASKS[mask](case.k))
    args = (dy, x, list(x.shape), weight, *case.geometry(), *chosen, list(wanted), False)
    torch.library.opcheck(torch.ops.neq_kernels.conv_backward.default, args, **options)


def opcheck_linear(mask, wanted, active_dgrad, **options):
    x, weight, dy = torch.randn(4, 3, 7), torch.randn(9, 7), torch.randn(4, 3, 9)
    chosen = selection(MASKS[mask](9))
    args = (dy, x, [4, 3, 7], weight, *chosen, list(wanted), active_dgrad)
    torch.library.opcheck(torch.ops.neq_kernels.linear_backward.default, args, **options)


@pytest.mark.parametrize(("mask", "wanted"), OPCHECKS, ids=str)
@pytest.mark.parametrize("fmt", ["contiguous", "channels_last"])
def test_opcheck_conv(mask, wanted, fmt):
    opcheck_conv(CONVS["plain"], fmt, mask, wanted)


@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_fakes_agree_with_every_backend(backend, case):
    """Shapes, dtypes and strides; inputs are not written."""
    for fmt in FORMATS[len(case.kernel)]:
        for mask, wanted in OPCHECKS:
            utils = ("test_schema", "test_faketensor")
            opcheck_conv(case, fmt, mask, wanted, test_utils=utils)


@pytest.mark.parametrize(("mask", "wanted"), OPCHECKS, ids=str)
@pytest.mark.parametrize("active_dgrad", [False, True])
def test_opcheck_linear(mask, wanted, active_dgrad):
    opcheck_linear(mask, wanted, active_dgrad)


def test_fakes_agree_with_every_backend_linear(backend):
    for mask, wanted in OPCHECKS:
        opcheck_linear(mask, wanted, False, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_opcheck_channel_similarity(backend, dim):
    a, b = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    torch.library.opcheck(torch.ops.neq_kernels.channel_similarity.default, (a, b, dim))


def test_opcheck_without_an_input(backend):
    case = CONVS["plain"]
    x, weight, dy = conv_tensors(case, make=torch.randn, dtype=torch.float32)
    none = selection([False] * case.k)
    torch.library.opcheck(
        torch.ops.neq_kernels.conv_backward.default,
        (dy, None, list(x.shape), weight, *case.geometry(), *none, list(ALL), False),
    )
    dy, weight = torch.randn(4, 9), torch.randn(9, 7)
    torch.library.opcheck(
        torch.ops.neq_kernels.linear_backward.default,
        (dy, None, [4, 7], weight, *selection([False] * 9), list(ALL), False),
    )
