"""Calls of a layer are planned once, and planned anew after whatever a plan depends on changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels import ActiveChannels
from neq_kernels.autograd import eager
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch import selection
from neq_kernels.dispatch.selection import selector
from neq_kernels.functional import conv, linear
from tests.support import oracle
from tests.support.arrange import threads
from tests.support.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="plans use the extension")

MASK = oracle.half(6)


@pytest.fixture
def planned(monkeypatch):
    """The layers that were planned, in order."""
    made = []
    for name in ("plan_linear", "plan_conv"):
        original = getattr(eager, name)

        def spy(*args, original=original, name=name):
            made.append(name)
            return original(*args)

        monkeypatch.setattr(eager, name, spy)
    return made


def call(channels, x=None, weight=None, **arguments):
    """Forward and backward of a convolution; the gradient of its weight."""
    x = torch.ones(2, 4, 5, 5) if x is None else x
    weight = torch.ones(6, 4, 3, 3) if weight is None else weight
    weight = weight.detach().requires_grad_()
    conv(x, weight, None, channels, **arguments).sum().backward()
    return weight.grad


def test_a_second_call_finds_the_plan_of_the_first(planned):
    channels = oracle.channels_with(MASK)
    first, second = call(channels), call(channels)
    assert planned == ["plan_conv"]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(3, 4, 5, 5)},
        {"x": torch.ones(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)},
        {"x": torch.ones(2, 4, 5, 5).double(), "weight": torch.ones(6, 4, 3, 3).double()},
        {"weight": torch.ones(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)},
        {"weight": torch.ones(6, 4, 1, 3)},
        {"stride": 2},
        {"padding": (1, 0)},
        {"dilation": 2},
        {"padding": "same"},
        {"grad_input": "active"},
    ],
    ids=str,
)
def test_another_call_gets_a_plan_of_its_own(planned, changed):
    channels = oracle.channels_with(MASK)
    call(channels)
    grad = call(channels, **changed)
    assert len(planned) == 2
    weight = changed.get("weight", torch.ones(6, 4, 3, 3)).detach().clone().requires_grad_()
    geometry = {k: v for k, v in changed.items() if k not in ("x", "weight", "grad_input")}
    F.conv2d(
        changed.get("x", torch.ones(2, 4, 5, 5)).to(weight), weight, **geometry
    ).sum().backward()
    expected = weight.grad.clone()
    expected[channels.frozen] = 0
    assert torch.equal(grad, expected)
    assert grad.stride() == weight.stride()


def test_a_change_of_the_set_ends_all_plans(planned):
    channels = oracle.channels_with(MASK)
    call(channels)
    channels.set([0])
    assert not channels.plans
    assert bool((call(channels)[1:] == 0).all())
    assert len(planned) == 2
    channels.set([0])  # the same set
    call(channels)
    assert len(planned) == 2


def test_threads_and_choices_of_strategy_are_noticed(planned):
    channels = oracle.channels_with(MASK)
    call(channels)
    with threads(torch.get_num_threads() + 1):
        call(channels)
    for strategy in (Strategy.DENSE, Strategy.PACK, Strategy.CUSTOM):
        with selector.forced_strategy(strategy):
            call(channels)
    assert len(planned) == 5


def test_lists_are_as_good_as_tuples():
    channels = oracle.channels_with(MASK)
    as_lists = call(channels, stride=[2, 1], padding=[1, 0], dilation=[1, 1])
    assert torch.equal(as_lists, call(channels, stride=(2, 1), padding=(1, 0), dilation=(1, 1)))


def test_plans_are_few():
    channels = oracle.channels_with(MASK)
    weight = torch.ones(6, 3, requires_grad=True)
    for rows in range(1, 200):
        linear(torch.ones(rows, 3), weight, None, channels)
    assert len(channels.plans) <= 64


def test_copies_have_no_plans():
    channels = oracle.channels_with(MASK)
    call(channels)
    for other in (copy.deepcopy(channels), pickle.loads(pickle.dumps(channels))):
        assert not other.plans
        assert torch.equal(other.mask, channels.mask)
        assert torch.equal(call(other), call(channels))


def test_bad_arguments_raise_however_often_they_come():
    channels = ActiveChannels(5)
    for _ in range(2):
        with pytest.raises(ValueError, match="channels: expected 6 channels, got 5"):
            call(channels)
        with pytest.raises(ValueError, match="stride: expected 2 numbers"):
            call(oracle.channels_with(MASK), stride=(1, 1, 1))
    assert not channels.plans


def test_a_set_changed_between_forward_and_backward_is_an_error():
    for mask in (MASK, [True] * 6, [False] * 6):
        channels = oracle.channels_with(mask)
        x, weight = torch.ones(4, 3, requires_grad=True), torch.ones(6, 3, requires_grad=True)
        out = linear(x, weight, None, channels)
        channels.set([1, 2])
        with pytest.raises(RuntimeError, match="were changed between its forward and its backward"):
            out.sum().backward()


def test_backward_inside_autocast_casts_nothing():
    channels = oracle.channels_with(MASK)
    x, weight = torch.randn(40, 30), torch.randn(6, 30, requires_grad=True)
    dy = torch.randn(40, 6)
    out = linear(x, weight, None, channels)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(dy)
    expected = (dy.t() @ x).index_fill(0, channels.frozen, 0)
    torch.testing.assert_close(weight.grad, expected)


def test_differentiating_twice_through_a_replaced_convolution():
    channels = ActiveChannels(6)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    with selector.forced_strategy(Strategy.CUSTOM):
        assert torch.autograd.gradgradcheck(lambda x, w: conv(x, w, None, channels), (x, weight))


def test_differentiating_twice_where_the_bias_alone_learns():
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(8, 1, 3, 3).double(), torch.zeros(8).double().requires_grad_()
    channels = ActiveChannels(8)
    with selector.forced_strategy(Strategy.CUSTOM):
        out = conv(x, weight, bias, channels, groups=8)
        dx, db = torch.autograd.grad(out.sum(), [x, bias], create_graph=True)
    dense_x = x.detach().requires_grad_()
    dense = torch.nn.functional.conv2d(dense_x, weight, bias, groups=8)
    expected = torch.autograd.grad(dense.sum(), [dense_x, bias])
    torch.testing.assert_close((dx, db), expected)


@pytest.mark.parametrize("everything", [True, False])
def test_a_backend_that_does_not_exist_is_an_error_at_the_first_call(everything, monkeypatch):
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "abacus")
    selector.forget_backends()
    channels = ActiveChannels(6) if everything else oracle.channels_with(MASK)
    with pytest.raises(ValueError, match="got 'abacus'"):
        call(channels)
    monkeypatch.undo()
    selector.forget_backends()


def test_subclasses_and_modes_take_the_general_way():
    class Other(torch.Tensor):
        pass

    plain, weight = torch.ones(2, 4, 5, 5), torch.ones(6, 4, 3, 3, requires_grad=True)

    def planned(x, w=weight):
        return eager.call_key(x, w, None) is not None

    assert planned(plain)
    assert planned(plain, nn.Parameter(weight.detach()))
    assert not planned(plain, weight.detach())
    assert not planned(plain.as_subclass(Other))
    assert not planned(torch.ones(2, 4, 5, 5, device="meta"))
    with torch.no_grad():
        assert not planned(plain)


def test_a_mode_sees_the_operator():
    channels = oracle.channels_with(MASK)
    weight = torch.ones(6, 4, 3, 3, requires_grad=True)
    out = conv(torch.ones(2, 4, 5, 5), weight, None, channels)
    with oracle.CalledOps() as called:
        out.sum().backward()
    assert weight.grad is not None
    assert "conv_backward" in called.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_gradients_of_frozen_entries_are_zero_whatever_comes(dtype):
    model = neq.convert(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
    norm = model[0].to(dtype)
    norm.channels.set(MASK)
    grad = torch.randn(4, 6, dtype=dtype)
    grad[:, norm.channels.frozen] = float("nan")
    norm(torch.randn(4, 6, dtype=dtype)).backward(grad)
    for parameter in (norm.weight, norm.bias):
        assert bool((parameter.grad[norm.channels.frozen] == 0).all())
        assert bool(parameter.grad[norm.channels.active].isfinite().all())


def test_a_call_checks_its_numbers():
    with pytest.raises(ValueError, match="numbers: expected 4 of dtype Long"):
        torch.ops.neq_kernels_cpu.linear_backward(
            torch.ones(2, 2),
            torch.ones(2, 2),
            torch.ones(2, 2),
            torch.arange(2),
            torch.ones(3),
            False,
            True,
            False,
        )
