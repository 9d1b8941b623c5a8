"""Calls under autocast on the CPU are planned as others are, and give PyTorch's dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels import ActiveChannels
from neq_kernels.autograd import eager
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from neq_kernels.functional import conv, linear
from tests.support import oracle
from tests.support.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="plans use the extension")

LOW = [torch.bfloat16, torch.float16]
STRATEGIES = [Strategy.DENSE, Strategy.PACK, Strategy.CUSTOM]
CASES = {
    "linear": (lambda *t, **k: linear(*t, **k), F.linear, (40, 32), (24, 32), {}),
    "conv": (conv, F.conv2d, (3, 16, 9, 9), (24, 16, 3, 3), {"padding": 1}),
    "strided": (conv, F.conv2d, (3, 16, 9, 9), (24, 16, 1, 1), {"stride": 2}),
    "depthwise": (conv, F.conv2d, (3, 24, 9, 9), (24, 1, 3, 3), {"groups": 24}),
    "transposed": (
        lambda *t, **k: conv(*t, **k, transposed=True),
        F.conv_transpose2d,
        (3, 16, 9, 9),
        (16, 24, 3, 3),
        {"stride": 2},
    ),
}
MASKS = {
    "half": oracle.half(24),
    "one": [i == 5 for i in range(24)],
    "run": [4 <= i < 12 for i in range(24)],
    "all but one": [i != 3 for i in range(24)],
}


def tensors(shape, weight_shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).to(dtype) for s in (shape, weight_shape, (24,))]
    return [t.requires_grad_() for t in made]


def gradients(function, operands, dtype, dy=None):
    """Outside of autocast, where plans compute them."""
    with torch.autocast("cpu", dtype):
        out = function(*operands)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad(out, operands, dy)


@pytest.fixture
def planned(monkeypatch):
    made = []
    original = eager.plan_linear

    def spy(*arguments):
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(eager, "plan_linear", spy)
    return made


def test_a_plan_is_for_the_dtype_of_autocast(planned):
    channels = oracle.channels_with(MASKS["half"])
    x, weight, bias = tensors((40, 32), (24, 32))
    outs = []
    for dtype in (None, *LOW, *LOW, None):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outs.append(linear(x, weight, bias, channels).dtype)
    assert [plan.autocast for plan in planned] == [None, *LOW]
    assert outs == [torch.float32, *LOW, *LOW, torch.float32]


def test_autocast_leaves_float64_alone(planned):
    channels = oracle.channels_with(MASKS["half"])
    x, weight, _ = (t.detach().double().requires_grad_() for t in tensors((40, 32), (24, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None, channels).dtype == torch.float64
    assert planned == [None]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_within_the_rule(case, dtype, strategy, memory_format):
    ours, theirs, shape, weight_shape, arguments = case
    operands = tensors(shape, weight_shape)
    if len(shape) == 4:
        operands[:2] = [
            t.detach().contiguous(memory_format=memory_format).requires_grad_()
            for t in operands[:2]
        ]
    layout = {"transposed": True} if theirs is F.conv_transpose2d else {}
    dense_out, low = gradients(lambda *t: theirs(*t, **arguments), operands, dtype)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in operands]
    out64 = theirs(*rounded, **arguments)
    dy = torch.randn(out64.shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    exact = torch.autograd.grad(out64, rounded, dy)
    for mask in MASKS.values():
        channels = oracle.channels_with(mask)
        with selector.forced_strategy(strategy):
            out, grads = gradients(lambda *t, c=channels: ours(*t, c, **arguments), operands, dtype)
        assert torch.equal(out, dense_out)
        for i, (grad, theirs_low, true, operand) in enumerate(
            zip(grads, low, exact, operands, strict=True)
        ):
            assert grad.dtype == operand.dtype
            where = layout if i == 1 else {}
            if i > 0:
                assert grad.stride() == operand.stride()
                theirs_low = oracle.zero_frozen(theirs_low, mask, **where)
                true = oracle.zero_frozen(true, mask, **where)
                oracle.assert_frozen_are_zero(grad, mask, **where)
            oracle.assert_within_dtype_rule(grad.to(dtype), theirs_low.to(dtype), true)


@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=lambda s: s.name)
@pytest.mark.parametrize("case", [CASES["linear"], CASES["conv"], CASES["transposed"]])
def test_what_is_written_in_float_is_what_would_be_cast(case, strategy):
    ours, _, shape, weight_shape, arguments = case
    operands = tensors(shape, weight_shape)
    channels = oracle.channels_with(MASKS["half"])
    halves = [t.detach().bfloat16().requires_grad_() for t in operands]

    def function(*t):
        return ours(*t, channels, **arguments)

    with selector.forced_strategy(strategy):
        _, grads = gradients(function, operands, torch.bfloat16)
        _, of_halves = gradients(function, halves, torch.bfloat16)
    for grad, half in zip(grads, of_halves, strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(grad, half.float())


def test_everything_active_is_pytorchs_own_graph():
    x, weight, bias = tensors((40, 32), (24, 32))
    with torch.autocast("cpu", torch.bfloat16):
        outs = [linear(x, weight, bias, ActiveChannels(24)), F.linear(x, weight, bias)]
    assert outs[0].grad_fn.name() == outs[1].grad_fn.name()
    grads = [torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out)) for out in outs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_second_derivatives_reach_the_weight():
    operands = tensors((40, 32), (24, 32))
    seconds = []
    for function in (lambda *t: linear(*t, oracle.channels_with(MASKS["half"])), F.linear):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*operands)
        (dx,) = torch.autograd.grad(out.float().square().sum(), operands[0], create_graph=True)
        seconds.append(torch.autograd.grad(dx.square().sum(), operands[1])[0])
    active = torch.tensor(MASKS["half"])
    torch.testing.assert_close(seconds[0][active], seconds[1][active], rtol=0.05, atol=2.0)
    assert bool((seconds[0][~active] == 0).all())


def test_a_weight_modified_before_its_backward_is_noticed_where_it_is_read():
    x, weight, _ = tensors((40, 32), (24, 32))
    dense_x, dense_weight, _ = tensors((40, 32), (24, 32))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, None, oracle.channels_with(MASKS["half"]))
        dense = F.linear(dense_x, dense_weight)
    with torch.no_grad():
        weight.add_(1)
        dense_weight.add_(1)
    # As in PyTorch: a first derivative reads what the forward has cast.
    ones = torch.ones_like(out)
    (dx,) = torch.autograd.grad(out, x, ones, retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(dense, dense_x, ones)[0])
    with pytest.raises(RuntimeError, match="expected version 0, got 1"):
        torch.autograd.grad(out, x, ones, create_graph=True)


def test_a_model_trains_as_pytorchs():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 36, 8),
        )  # fmt: skip

    dense, ours = model(), neq.convert(model())
    ours[0].channels.set(range(0, 16, 2))
    x = torch.randn(4, 3, 6, 6)
    for net in (dense, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).float().square().mean()
        loss.backward()
    for (name, theirs), own in zip(dense.named_parameters(), ours.parameters(), strict=True):
        expected = theirs.grad.clone()
        if name.startswith("0."):
            expected[1::2] = 0
        assert own.grad.dtype == torch.float32
        torch.testing.assert_close(own.grad, expected, rtol=0.02, atol=1e-4)
