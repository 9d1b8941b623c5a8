"""The error of the ops in low precision, their determinism, and the dense case."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from tests.support import oracle
from tests.support.op_cases import (
    CONVS,
    FORMATS,
    MASKS,
    WIDER,
    conv_tensors,
    in_format,
    run_conv,
    run_linear,
    selection,
)

HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


LONG_MASKS = {
    "one": MASKS["one"],
    "run": lambda k: [1 <= i < 6 for i in range(k)],
    "last": lambda k: [i >= k - 2 for i in range(k)],
    "ragged": lambda k: [i < 14 and i % 2 == 0 for i in range(k)],
    "most": MASKS["ragged"],
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    """Libraries divide the rows among threads, and sum what is left over differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_gradients_within_the_rule(draw, run, dense, exact, k, zero_frozen, masks=MASKS):
    """All masks and four draws of the tensors each form one sample per gradient: the error of a
    handful of sums, such as one active neuron's bias, is luck."""
    ours, theirs, true = [], [], []
    for mask in masks.values():
        active = mask(k)
        for _ in range(4):
            tensors = draw()
            ours.append(run(*tensors, active))
            theirs.append(zero_frozen(dense(*tensors), active))
            true.append(exact(*tensors, active))
    for samples in zip(*(zip(*s, strict=True) for s in (ours, theirs, true)), strict=True):
        oracle.assert_within_dtype_rule(*map(torch.stack, samples))


def assert_conv_within_the_rule(case, draw, masks=MASKS):
    def dense(x, weight, dy):
        bias = torch.zeros(case.k, dtype=x.dtype)
        return oracle.dense(case.forward, x, weight, bias, grad_output=dy)

    def zero_frozen(grads, mask):
        dx, dw, db = grads
        return dx, oracle.zero_frozen(dw, mask, **case.layout), oracle.zero_frozen(db, mask)

    def run(*args):
        return run_conv(case, *args)

    def exact(*args):
        return oracle.conv_gradients(case, *args)

    assert_gradients_within_the_rule(draw, run, dense, exact, case.k, zero_frozen, masks)


def assert_linear_within_the_rule(shape, k, dtype, masks=MASKS):
    def draw():
        shapes = (shape, (k, shape[-1]), (*shape[:-1], k))
        return [torch.randn(s).to(dtype) for s in shapes]

    def dense(x, weight, dy):
        return oracle.dense(F.linear, x, weight, torch.zeros(k, dtype=dtype), grad_output=dy)

    def zero_frozen(grads, mask):
        return grads[0], *(oracle.zero_frozen(g, mask) for g in grads[1:])

    assert_gradients_within_the_rule(
        draw, run_linear, dense, oracle.linear_gradients, k, zero_frozen, masks
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", WIDER.values(), ids=WIDER.keys())
def test_conv_error_is_within_the_rule(backend, case, dtype):
    for fmt in FORMATS[len(case.kernel)]:

        def draw(fmt=fmt):
            tensors = conv_tensors(case, batch=3, size=10, make=torch.randn, dtype=dtype)
            return [in_format(t, fmt) for t in tensors]

        assert_conv_within_the_rule(case, draw)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(96, 33), (6, 40, 64)], ids=str)
def test_linear_error_is_within_the_rule(backend, shape, dtype):
    assert_linear_within_the_rule(shape, 48, dtype)


PACKING = [name for name in oracle.usable_backends() if name != "reference"]


@pytest.mark.parametrize("backend", PACKING, indirect=True)
@pytest.mark.parametrize("case", ["pointwise", "pointwise grouped"])
@pytest.mark.parametrize("fmt", ["contiguous", "channels_last"])
def test_conv_error_over_a_long_reduction(backend, threads, case, fmt):
    """Few rows must not be summed more carelessly than many."""
    case = WIDER[case]

    def draw():
        tensors = conv_tensors(case, batch=4, size=32, make=torch.randn, dtype=torch.float32)
        return [in_format(t, fmt) for t in tensors]

    assert_conv_within_the_rule(case, draw, LONG_MASKS)


@pytest.mark.parametrize("backend", PACKING, indirect=True)
def test_linear_error_over_a_long_reduction(backend, threads):
    assert_linear_within_the_rule((10_000, 24), 16, torch.float32, LONG_MASKS)


# --- determinism, and the dense case -------------------------------------------------------------


@pytest.mark.usefixtures("stock_algorithms")
def test_two_runs_give_the_same_bits(backend):
    for case, mask in itertools.product(WIDER.values(), MASKS.values()):
        active = mask(case.k)
        x, weight, dy = conv_tensors(case, batch=4, size=12, make=torch.randn, dtype=torch.float32)
        first, second = (run_conv(case, x, weight, dy, active) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x, weight, dy = torch.randn(96, 33), torch.randn(48, 33), torch.randn(96, 48)
    for mask in MASKS.values():
        first, second = (run_linear(x, weight, dy, mask(48)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("stock_algorithms")
def test_everything_active_densely_is_torchs_own_calls_and_bits():
    with selector.forced_strategy(Strategy.DENSE):
        assert_torchs_own_calls_and_bits()


def assert_torchs_own_calls_and_bits():
    for case in CONVS.values():
        x, weight, dy = conv_tensors(case, make=torch.randn, dtype=torch.float32)
        theirs = oracle.dense(case.forward, x, weight, torch.zeros(case.k), grad_output=dy)
        everything = selection([True] * case.k)
        with oracle.CalledOps() as called:
            ours = run_conv(case, x, weight, dy, everything)
        assert called.that_compute() == ["convolution_backward"]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    x, weight, dy = torch.randn(6, 4, 33), torch.randn(48, 33), torch.randn(6, 4, 48)
    theirs = oracle.dense(F.linear, x, weight, torch.zeros(48), grad_output=dy)
    everything = selection([True] * 48)
    with oracle.CalledOps() as called:
        ours = run_linear(x, weight, dy, everything)
    assert called.that_compute() == ["mm", "mm", "sum"]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
