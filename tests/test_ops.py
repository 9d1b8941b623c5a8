"""The public ops against dense autograd in float64, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracle
from tests.support.op_cases import (
    ALL,
    CONVS,
    FORMATS,
    MASKS,
    assert_conv_equals,
    conv_tensors,
    in_format,
    run_conv,
    run_linear,
)
from tests.support.oracle import Conv


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
