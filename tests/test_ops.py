"""The public ops against dense autograd in float64, on every backend."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from neq_kernels import dispatch, ops
from neq_kernels.backends import aten, cpu
from tests import oracle
from tests.oracle import Conv

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
    return ops.linear_backward(dy, x, size, weight, *selection(mask), list(wanted), active_dgrad)


def run_conv(case, x, weight, dy, mask, wanted=ALL, active_dgrad=False, input_size=None):
    return ops.conv_backward(
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


# --- cases ---------------------------------------------------------------------------------------

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


# --- correctness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_conv_backward_is_the_dense_one_with_frozen_neurons_at_zero(backend, case, mask):
    mask = mask(case.k)
    for dtype, fmt in itertools.product((torch.float32, torch.float64), FORMATS[len(case.kernel)]):
        x, weight, dy = conv_tensors(case, dtype=dtype)
        expected = oracle.conv_gradients(case, x, weight, dy, mask)
        x, weight, dy = (in_format(t, fmt) for t in (x, weight, dy))
        grads = run_conv(case, x, weight, dy, mask)
        assert_conv_equals(case, grads, expected, mask)
        assert all(g.dtype == dtype for g in grads)
        assert grads[1].stride() == weight.stride()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(7,), (4, 3, 7), (0, 7), (2, 0, 3, 7)], ids=str)
def test_linear_backward_is_the_dense_one_with_frozen_neurons_at_zero(backend, shape, mask):
    mask = mask(9)
    for dtype in (torch.float32, torch.float64):
        x = oracle.small_integers(shape, dtype)
        weight = oracle.small_integers((9, 7), dtype)
        dy = oracle.small_integers((*shape[:-1], 9), dtype)
        grads = run_linear(x, weight, dy, mask)
        for grad, exact in zip(grads, oracle.linear_gradients(x, weight, dy, mask), strict=True):
            assert grad.dtype == dtype
            assert grad.shape == exact.shape
            assert torch.equal(grad.double(), exact)
        oracle.assert_frozen_are_zero(grads[1], mask)
        oracle.assert_frozen_are_zero(grads[2], mask)


@st.composite
def conv_cases(draw):
    """A convolution with its tensors' shapes and layouts, all valid for PyTorch."""
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = groups > 1 and draw(st.booleans())
    channels = st.integers(1, 4)

    def each(strategy):
        return tuple(draw(strategy) for _ in range(dims))

    stride, dilation = each(st.integers(1, 3)), each(st.integers(1, 2))
    case = Conv(
        kernel=each(st.integers(1, 3)),
        in_per_group=1 if depthwise else draw(channels),
        out_per_group=draw(channels),
        groups=groups,
        stride=stride,
        padding=each(st.integers(0, 2)),
        dilation=dilation,
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1)) if transposed else 0
            for s, d in zip(stride, dilation, strict=True)
        ),
        transposed=transposed,
    )
    size = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 8))
        if not transposed
        else draw(st.integers(1 + max(0, -(-(2 * p - d * (k - 1) - o) // s)), 6))
        for k, s, p, d, o in zip(
            case.kernel, case.stride, case.padding, case.dilation, case.output_padding, strict=True
        )
    )
    batch = draw(st.sampled_from([0, 1, 2, 2]))
    layouts = st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"])
    return case, (batch, case.c, *size), [draw(layouts) for _ in range(3)]


@settings(max_examples=120)
@given(data=st.data())
def test_conv_backward_on_any_convolution(backend, data):
    case, shape, formats = data.draw(conv_cases())
    mask = data.draw(st.lists(st.booleans(), min_size=case.k, max_size=case.k))
    wanted = data.draw(st.tuples(*[st.booleans()] * 3))
    active_dgrad = data.draw(st.booleans())
    x, weight = oracle.small_integers(shape), oracle.small_integers(case.weight_shape)
    dy = oracle.small_integers(case.forward(x, weight).shape)
    propagated = dy
    if active_dgrad:
        propagated = dy * torch.tensor(mask).view(1, -1, *[1] * len(case.kernel))
    expected = oracle.conv_gradients(case, x, weight, propagated, mask)
    x, weight, dy = (in_format(t, f) for t, f in zip((x, weight, dy), formats, strict=True))
    grads = run_conv(case, x, weight, dy, mask, wanted, active_dgrad)
    for grad, exact, asked in zip(grads, expected, wanted, strict=True):
        assert torch.equal(grad, exact) if asked else grad.numel() == 0
    if wanted[1]:
        oracle.assert_frozen_are_zero(grads[1], mask, **case.layout)
        if weight.is_contiguous() or formats[1] == "channels_last":
            assert grads[1].stride() == weight.stride()
    if wanted[2]:
        oracle.assert_frozen_are_zero(grads[2], mask)


@settings(max_examples=80)
@given(data=st.data())
def test_linear_backward_on_any_shape(backend, data):
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    k, c = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 9))
    mask = data.draw(st.lists(st.booleans(), min_size=k, max_size=k))
    wanted = data.draw(st.tuples(*[st.booleans()] * 3))
    formats = data.draw(st.tuples(*[st.sampled_from(["contiguous", "sliced", "permuted"])] * 3))
    x, weight = oracle.small_integers((*lead, c)), oracle.small_integers((k, c))
    dy = oracle.small_integers((*lead, k))
    expected = oracle.linear_gradients(x, weight, dy, mask)
    x, weight, dy = (in_format(t, f) for t, f in zip((x, weight, dy), formats, strict=True))
    grads = run_linear(x, weight, dy, mask, wanted)
    for grad, exact, asked in zip(grads, expected, wanted, strict=True):
        assert torch.equal(grad, exact) if asked else grad.numel() == 0
    if wanted[1]:
        oracle.assert_frozen_are_zero(grads[1], mask)
    if wanted[2]:
        oracle.assert_frozen_are_zero(grads[2], mask)


def test_expanded_gradients_as_sum_makes_them(backend):
    case = CONVS["plain"]
    mask = oracle.ragged(case.k)
    x, weight, dy = conv_tensors(case)
    ones = torch.ones((), dtype=dy.dtype).expand(dy.shape)
    grads = run_conv(case, x, weight, ones, mask)
    assert_conv_equals(case, grads, oracle.conv_gradients(case, x, weight, ones, mask), mask)
    row = oracle.small_integers((1, 1, 7)).expand(4, 3, 7)
    weight = oracle.small_integers((9, 7))
    ones = torch.ones((), dtype=row.dtype).expand(4, 3, 9)
    mask = oracle.ragged(9)
    expected = oracle.linear_gradients(row, weight, ones, mask)
    for grad, exact in zip(run_linear(row, weight, ones, mask), expected, strict=True):
        assert torch.equal(grad, exact)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("case", [CONVS["plain"], CONVS["grouped"], CONVS["transposed grouped"]])
def test_only_what_is_asked_for(backend, case, wanted):
    x, weight, dy = conv_tensors(case)
    for mask in MASKS.values():
        mask = mask(case.k)
        expected = oracle.conv_gradients(case, x, weight, dy, mask)
        grads = run_conv(case, x, weight, dy, mask, wanted)
        for grad, exact, asked in zip(grads, expected, wanted, strict=True):
            assert torch.equal(grad, exact) if asked else grad.shape == (0,)


def test_the_input_is_not_needed_where_it_is_not_read(backend):
    """It is absent when it was not saved: no active neuron, or the weight wants no gradient."""
    for case in (CONVS["plain"], CONVS["depthwise"], CONVS["transposed"], CONVS["1d"]):
        x, weight, dy = conv_tensors(case)
        for mask, wanted in (
            ([False] * case.k, ALL),
            (oracle.ragged(case.k), (True, False, True)),
            ([True] * case.k, (True, False, True)),
            (oracle.ragged(case.k), (False, False, True)),
        ):
            grads = run_conv(case, None, weight, dy, mask, wanted, input_size=x.shape)
            expected = oracle.conv_gradients(case, x, weight, dy, mask)
            for grad, exact, asked in zip(grads, expected, wanted, strict=True):
                assert torch.equal(grad, exact) if asked else grad.numel() == 0
    weight, dy = oracle.small_integers((5, 4)), oracle.small_integers((3, 5))
    dense = (dy @ weight, dy.sum(0))
    dx, dw, db = run_linear(None, weight, dy, [False] * 5)
    assert torch.equal(dx, dense[0])
    assert dw.shape == (5, 4)
    assert bool((dw == 0).all())
    assert bool((db == 0).all())
    mask = oracle.ragged(5)
    dx, _, db = run_linear(None, weight, dy, mask, (True, False, True))
    assert torch.equal(dx, dense[0])
    assert torch.equal(db, oracle.zero_frozen(dense[1], mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_active_dgrad_propagates_active_channels_only(backend, mask):
    for case in CONVS.values():
        active = mask(case.k)
        x, weight, dy = conv_tensors(case)
        keep = torch.tensor(active).view(1, -1, *[1] * len(case.kernel))
        (dx,) = oracle.dense(lambda x, c=case, w=weight: c.forward(x, w), x, grad_output=dy * keep)
        dirty = dy.where(keep, torch.nan)
        grads = run_conv(case, x, weight, dirty, active, active_dgrad=True)
        expected = oracle.conv_gradients(case, x, weight, dy, active)
        assert_conv_equals(case, grads, (dx, *expected[1:]), active)
    active = mask(9)
    x, weight, dy = (oracle.small_integers(s) for s in ((4, 7), (9, 7), (4, 9)))
    keep = torch.tensor(active)
    grads = run_linear(x, weight, dy.where(keep, torch.nan), active, active_dgrad=True)
    assert torch.equal(grads[0], (dy * keep) @ weight)
    for grad, exact in zip(
        grads[1:], oracle.linear_gradients(x, weight, dy, active)[1:], strict=True
    ):
        assert torch.equal(grad, exact)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", ["one", "run", "ragged", "all but one", "none"])
def test_nan_and_inf_in_frozen_channels_reach_nothing(backend, mask, poison):
    for case, dtype in itertools.product(CONVS.values(), (torch.float32, torch.bfloat16)):
        active = MASKS[mask](case.k)
        for fmt in FORMATS[len(case.kernel)]:
            x, weight, dy = conv_tensors(case, dtype=dtype)
            keep = torch.tensor(active).view(1, -1, *[1] * len(case.kernel))
            x, weight, dy = (in_format(t, fmt) for t in (x, weight, dy))
            clean = run_conv(case, x, weight, dy, active, (False, True, True))
            dirty = in_format(dy.where(keep, poison), fmt)
            for grad, exact in zip(
                run_conv(case, x, weight, dirty, active, (False, True, True))[1:],
                clean[1:],
                strict=True,
            ):
                assert torch.equal(grad, exact)
    active = MASKS[mask](9)
    x, weight, dy = (oracle.small_integers(s) for s in ((4, 7), (9, 7), (4, 9)))
    dirty = dy.where(torch.tensor(active), poison)
    _, dw, db = run_linear(x, weight, dirty, active, (False, True, True))
    expected = oracle.linear_gradients(x, weight, dy, active)
    assert torch.equal(dw, expected[1])
    assert torch.equal(db, expected[2])


@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_empty_batches_give_zeros(backend, case):
    for mask in MASKS.values():
        active = mask(case.k)
        x, weight, dy = conv_tensors(case, batch=0)
        dx, dw, db = run_conv(case, x, weight, dy, active)
        assert dx.shape == x.shape
        assert dw.shape == weight.shape
        assert bool((dw == 0).all())
        assert db.shape == (case.k,)
        assert bool((db == 0).all())


@pytest.mark.parametrize("fmt", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS.keys())
def test_weight_gradients_have_the_weights_strides(backend, case, fmt):
    x, weight, dy = conv_tensors(case)
    weight = in_format(weight, fmt)
    for mask in MASKS.values():
        grad = run_conv(case, x, weight, dy, mask(case.k))[1]
        assert grad.stride() == weight.stride()
    weight = in_format(oracle.small_integers((9, 7)), fmt)
    x, dy = oracle.small_integers((4, 7)), oracle.small_integers((4, 9))
    for mask in MASKS.values():
        assert run_linear(x, weight, dy, mask(9))[1].stride() == weight.stride()


# --- low precision -------------------------------------------------------------------------------

WIDER = {
    "plain": Conv((3, 3), 16, 24, padding=(1, 1)),
    "pointwise": Conv((1, 1), 32, 40),
    "pointwise grouped": Conv((1, 1), 16, 16, groups=2),
    "grouped": Conv((3, 3), 8, 8, groups=4, padding=(1, 1)),
    "depthwise": Conv((3, 3), 1, 1, groups=24, padding=(1, 1)),
    "1d": Conv((5,), 12, 20, stride=(2,)),
    "transposed": Conv((3, 3), 16, 12, stride=(2, 2), transposed=True),
}


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
def test_everything_active_is_torchs_own_calls_and_bits():
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


# --- the ops as operators ------------------------------------------------------------------------


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


# --- channel similarity --------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_channel_similarity_is_three_inner_products(backend, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    formats = data.draw(
        st.tuples(*[st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"])] * 2)
    )
    a, b = (oracle.small_integers(shape) for _ in range(2))
    rows_a, rows_b = (t.movedim(dim, 0).unsqueeze(-1).flatten(1) for t in (a, b))
    exact = torch.stack([(rows_a * rows_b).sum(1), (rows_a**2).sum(1), (rows_b**2).sum(1)])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        low = [in_format(t.to(dtype), f) for t, f in zip((a, b), formats, strict=True)]
        result = ops.channel_similarity(*low, dim)
        assert result.dtype == torch.float64
        assert torch.equal(result, exact)


def test_channel_similarity_accumulates_in_float64(backend):
    a = torch.full((1, 100_000), 1e-4)
    a[0, 0] = 100.0
    b = a.flip(1)
    a, b = a.double(), b.double()
    exact = torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
    result = ops.channel_similarity(a.float(), b.float(), 0)
    for ours, true in zip(result, exact, strict=True):
        oracle.assert_close64(ours, true, 1e-11)


@pytest.mark.parametrize(
    ("a", "b", "dim", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), 0, ValueError, r"b: expected a's shape \(2, 3\), got"),
        (torch.ones(2, 3), torch.ones(2, 3), 2, ValueError, r"dim: expected one of 2 .*, got 2"),
        (torch.ones(2, 3), torch.ones(2, 3), -3, ValueError, r"dim: expected one of 2 .*, got -3"),
        (torch.ones(2).long(), torch.ones(2), 0, TypeError, r"a: expected a floating.*int64"),
        (torch.ones(2), torch.ones(2).long(), 0, TypeError, r"b: expected a floating.*int64"),
    ],
)
def test_channel_similarity_refuses(a, b, dim, error, message):
    with pytest.raises(error, match=message):
        ops.channel_similarity(a, b, dim)


# --- backends ------------------------------------------------------------------------------------


def test_the_extension_is_built():
    """Without it the suite would test less than it says. NEQ_KERNELS_BACKEND=aten says so on
    purpose."""
    reason = cpu.unavailable()
    chosen = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    assert reason is None or chosen == "aten", reason


def test_the_best_usable_backend_serves(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.backend_for.cache_clear()
    assert dispatch.backend_for("cpu") == ("cpu" if cpu.unavailable() is None else "aten")
    assert dispatch.backend_for("meta") == "aten"
    dispatch.backend_for.cache_clear()


def test_a_missing_extension_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is missing on purpose")
    dispatch.backend_for.cache_clear()
    for _ in range(3):
        assert dispatch.backend_for("cpu") == "aten"
    dispatch.backend_for.cache_clear()
    assert [r.message for r in caplog.records] == [
        "backend cpu is not used for cpu tensors: it is missing on purpose"
    ]


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is missing on purpose")
    with oracle.forced_backend("cpu"), pytest.raises(RuntimeError, match="missing on purpose"):
        dispatch.backend_for("cpu")
    monkeypatch.undo()
    with oracle.forced_backend("cpu"), pytest.raises(RuntimeError, match=r"got meta|not built"):
        dispatch.backend_for("meta")
    with oracle.forced_backend("cudnn"), pytest.raises(ValueError, match="got 'cudnn'"):
        dispatch.backend_for("cpu")


# --- the suite itself can fail -------------------------------------------------------------------


def test_allocations_are_poisoned():
    weight = torch.ones(3, 4)
    for fresh in (torch.empty(5), torch.empty_like(weight), weight.new_empty(2, 2)):
        assert bool(fresh.isnan().all())


def planted(monkeypatch, where, name, fault):
    monkeypatch.setattr(where, name, fault(getattr(where, name)))


def off_by_one(scatter_rows):
    """The rows land one neuron further."""

    def wrong(rows, like, order, n, layout):
        return scatter_rows(rows, like, (order + 1) % len(order), n, layout)

    return wrong


def tail_left_as_allocated(scatter_rows):
    """The frozen neurons are never written."""

    def wrong(rows, like, order, n, layout):
        out = torch.empty_like(like)
        layout.scatter_(out, order[:n], layout.rows(rows))
        return out

    return wrong


def one_row_twice(pack):
    """The first active channel is a copy of the second."""

    def wrong(t, order, n, dim):
        return pack(t, torch.cat([order[1:2], order[1:]]), n, dim)

    return wrong


def multiplied(overwrite):
    """Frozen rows are multiplied by zero instead of overwritten."""

    def wrong(grads, layout, frozen):
        keep = torch.ones(layout.n_neurons(grads[1]))
        keep[frozen] = 0
        return grads[0] * keep.view(-1, *[1] * (grads[0].dim() - 1)), grads[1] * keep

    return wrong


@pytest.mark.parametrize("fault", [off_by_one, tail_left_as_allocated])
def test_planted_faults_in_scatter_are_caught(monkeypatch, fault):
    primitives = dispatch._BACKENDS[dispatch.backend_for("cpu")]
    planted(monkeypatch, primitives, "scatter_rows", fault)
    with pytest.raises(AssertionError):
        test_conv_backward_is_the_dense_one_with_frozen_neurons_at_zero(
            None, CONVS["plain"], MASKS["ragged"]
        )
    with pytest.raises(AssertionError):
        test_linear_backward_is_the_dense_one_with_frozen_neurons_at_zero(
            None, (4, 3, 7), MASKS["ragged"]
        )


def test_a_planted_fault_in_pack_is_caught(monkeypatch):
    primitives = dispatch._BACKENDS[dispatch.backend_for("cpu")]
    planted(monkeypatch, primitives, "pack", one_row_twice)
    for case in (CONVS["plain"], CONVS["grouped"]):
        with pytest.raises(AssertionError):
            test_conv_backward_is_the_dense_one_with_frozen_neurons_at_zero(
                None, case, MASKS["ragged"]
            )


def summed_in_one_chain(linear_wgrad):
    """The reduction of the weight gradient is one long chain of additions."""

    def wrong(grad_output, input, want):
        rows, bias = linear_wgrad(grad_output[:4], input[:4], want)
        for dy, x in zip(grad_output[4:].split(4), input[4:].split(4), strict=True):
            more, more_bias = linear_wgrad(dy, x, want)
            rows, bias = rows + more, bias + more_bias
        return rows, bias

    return wrong


def test_a_careless_sum_is_caught(monkeypatch):
    planted(monkeypatch, aten, "linear_wgrad", summed_in_one_chain)
    with oracle.forced_backend("aten"), pytest.raises(AssertionError, match="allowed"):
        test_linear_error_over_a_long_reduction(None, None)


def test_rows_multiplied_instead_of_overwritten_are_caught(monkeypatch):
    planted(monkeypatch, dispatch, "_overwrite_frozen", multiplied)
    with pytest.raises(AssertionError):
        test_nan_and_inf_in_frozen_channels_reach_nothing(None, "all but one", torch.nan)
