"""neq_kernels.functional: validation and the autograd Functions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from neq_kernels import ActiveChannels
from neq_kernels.autograd import eager
from neq_kernels.autograd.call_state import all_active, watched
from neq_kernels.functional import affine, conv, linear
from tests.support import oracle
from tests.support.oracle import Conv

CASES = {
    "plain": Conv((3, 2), 3, 4, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "grouped": Conv((3, 3), 2, 3, groups=2, padding=(1, 1)),
    "depthwise": Conv((3, 3), 1, 1, groups=4, padding=(1, 1)),
    "1d": Conv((3,), 3, 4),
    "3d": Conv((2, 1, 2), 2, 4),
    "transposed": Conv((3, 3), 3, 4, stride=(2, 2), output_padding=(1, 0), transposed=True),
    "transposed grouped": Conv((2, 3), 2, 2, groups=2, stride=(2, 1), transposed=True),
}


def leaves(case, size=5, dtype=torch.float64):
    x = torch.randn(2, case.c, *(size for _ in case.kernel), dtype=dtype, requires_grad=True)
    weight = torch.randn(case.weight_shape, dtype=dtype, requires_grad=True)
    bias = torch.randn(case.k, dtype=dtype, requires_grad=True)
    return x, weight, bias


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradcheck_conv(backend, case):
    """With everything active numerical gradients agree; with neurons frozen, for the input."""
    x, weight, bias = leaves(case, size=3)
    everything = ActiveChannels(case.k)

    def ours(x, weight, bias):
        return conv(x, weight, bias, everything, **case.keywords())

    assert torch.autograd.gradcheck(ours, (x, weight, bias))
    some = oracle.channels_with(oracle.half(case.k))

    def frozen(x):
        return conv(x, weight, bias, some, **case.keywords())

    assert torch.autograd.gradcheck(frozen, (x,))


def test_gradcheck_linear(backend):
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    tensors = [t.double().requires_grad_() for t in (x, weight, bias)]
    everything, some = ActiveChannels(5), oracle.channels_with(oracle.half(5))
    assert torch.autograd.gradcheck(lambda *t: linear(*t, everything), tensors)
    assert torch.autograd.gradcheck(lambda t: linear(t, *tensors[1:], some), tensors[:1])


@pytest.mark.parametrize("mask", [oracle.half, oracle.ragged, lambda k: [True] * k])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_conv_gradients(backend, case, mask):
    mask = mask(case.k)
    x, weight, bias = leaves(case)
    out = conv(x, weight, bias, oracle.channels_with(mask), **case.keywords())
    assert torch.equal(out, case.forward(x, weight, bias))
    dy = torch.randn_like(out)
    out.backward(dy)
    expected = oracle.conv_gradients(case, x, weight, dy, mask)
    for leaf, exact in zip((x, weight, bias), expected, strict=True):
        oracle.assert_close64(leaf.grad, exact, 1e-13)
    oracle.assert_frozen_are_zero(weight.grad, mask, **case.layout)
    oracle.assert_frozen_are_zero(bias.grad, mask)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_only_leaves_that_need_a_gradient_get_one(backend, case, needs, dtype):
    for mask in (oracle.half(case.k), [True] * case.k, [False] * case.k):
        tensors = leaves(case, dtype=dtype)
        for tensor, needed in zip(tensors, needs, strict=True):
            tensor.requires_grad_(needed)
        out = conv(*tensors, oracle.channels_with(mask), **case.keywords())
        learns = needs[0] or (any(needs[1:]) and any(mask))
        assert out.requires_grad == learns
        if not learns:
            continue
        out.sum().backward()
        expected = oracle.conv_gradients(case, *tensors[:2], torch.ones_like(out), mask)
        for i, (tensor, exact) in enumerate(zip(tensors, expected, strict=True)):
            if not needs[i] or (i > 0 and not any(mask)):
                assert tensor.grad is None
            else:
                assert tensor.grad.shape == exact.shape
                error = oracle.largest(tensor.grad.double() - exact)
                assert error <= 1e-5 * oracle.largest(exact)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_leaves_of_linear_that_need_a_gradient_get_one(backend, needs):
    for mask in (oracle.half(5), [True] * 5, [False] * 5):
        tensors = [
            oracle.small_integers(s).requires_grad_(n)
            for s, n in zip(((3, 4), (5, 4), (5,)), needs, strict=True)
        ]
        out = linear(*tensors, oracle.channels_with(mask))
        learns = needs[0] or (any(needs[1:]) and any(mask))
        assert out.requires_grad == learns
        if not learns:
            continue
        out.sum().backward()
        expected = oracle.linear_gradients(*tensors[:2], torch.ones_like(out), mask)
        for i, (tensor, exact) in enumerate(zip(tensors, expected, strict=True)):
            if not needs[i] or (i > 0 and not any(mask)):
                assert tensor.grad is None
            else:
                assert torch.equal(tensor.grad, exact)


def test_without_a_bias(backend):
    case, mask = CASES["plain"], oracle.half(4)
    x, weight, _ = leaves(case)
    out = conv(x, weight, None, oracle.channels_with(mask), **case.keywords())
    out.sum().backward()
    expected = oracle.conv_gradients(case, x, weight, torch.ones_like(out), mask)
    oracle.assert_close64(weight.grad, expected[1], 1e-13)
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    linear(x, weight, None, oracle.channels_with(oracle.half(5))).sum().backward()
    assert weight.grad[0].ne(0).any()
    oracle.assert_frozen_are_zero(weight.grad, oracle.half(5))


def test_the_approximate_mode_propagates_active_channels_only(backend):
    for case in CASES.values():
        mask = oracle.half(case.k)
        x, weight, bias = leaves(case)
        channels = oracle.channels_with(mask)
        out = conv(x, weight, bias, channels, grad_input="active", **case.keywords())
        dy = torch.randn_like(out)
        out.backward(dy)
        keep = torch.tensor(mask).view(1, -1, *[1] * len(case.kernel))
        exact = oracle.conv_gradients(case, x, weight, dy * keep, mask)
        for leaf, expected in zip((x, weight, bias), exact, strict=True):
            oracle.assert_close64(leaf.grad, expected, 1e-13)
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4)))
    dy = torch.randn(3, 5, dtype=torch.float64)
    channels = oracle.channels_with(oracle.half(5))
    linear(x, weight, None, channels, grad_input="active").backward(dy)
    oracle.assert_close64(x.grad, (dy * torch.tensor(oracle.half(5))) @ weight.detach(), 1e-13)


def test_the_approximate_mode_with_nothing_active_propagates_zeros(backend):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = linear(x, weight, None, oracle.channels_with([False] * 5), grad_input="active")
    out.sum().backward()
    assert bool((x.grad == 0).all())
    assert weight.grad is None


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1, 0)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_padding_as_pytorch_takes_it(backend, padding, kernel, dilation):
    tensors = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 8, 9), (4, 3, *kernel), (4,))
    ]
    mask = oracle.half(4)
    options = {"padding": padding, "dilation": dilation}
    ours = conv(*tensors, oracle.channels_with(mask), **options)
    theirs = F.conv2d(*tensors, **options)
    assert torch.equal(ours, theirs)
    dy = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, tensors, dy)
    dense = torch.autograd.grad(theirs, tensors, dy)
    expected = (dense[0], *(oracle.zero_frozen(g, mask) for g in dense[1:]))
    for grad, exact in zip(grads, expected, strict=True):
        oracle.assert_close64(grad, exact, 1e-13)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_unbatched_input(backend, case, dtype):
    mask = oracle.half(case.k)
    x, weight, bias = leaves(case, dtype=dtype)
    single = x[0].detach().clone().requires_grad_()
    out = conv(single, weight, bias, oracle.channels_with(mask), **case.keywords())
    assert torch.equal(out, case.forward(single, weight, bias))
    out.sum().backward()
    exact = oracle.conv_gradients(case, x[:1], weight, torch.ones_like(out)[None], mask)
    for leaf, expected in zip((single, weight, bias), (exact[0][0], *exact[1:]), strict=True):
        error = oracle.largest(leaf.grad.double() - expected)
        assert error <= 1e-5 * oracle.largest(expected)


def test_scalar_and_sequence_arguments_agree(backend):
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3, requires_grad=True)
    channels = oracle.channels_with([True, False, True])
    outs = [
        conv(x, weight, None, channels, stride=s, padding=p, dilation=d)
        for s, p, d in ((2, 1, 1), ((2, 2), (1, 1), (1, 1)), ([2], [1], [1]))
    ]
    assert all(torch.equal(outs[0], out) for out in outs)
    with pytest.raises(ValueError, match=r"stride: expected 2 numbers, got \(1, 1, 1\)"):
        conv(x, weight, None, channels, stride=(1, 1, 1))


def test_zero_sized_dimensions(backend):
    mask = oracle.half(5)
    for shape in ((0, 4), (2, 0, 4), (3, 0)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, shape[-1], dtype=torch.float64, requires_grad=True)
        linear(x, weight, None, oracle.channels_with(mask)).sum().backward()
        assert x.grad.shape == x.shape
        assert weight.grad.shape == weight.shape
        assert bool((weight.grad == 0).all())


# --- what is saved, and where backprop stops -----------------------------------------------------


def saved_by(function):
    """The tensors that autograd saves while ``function`` runs, and its result."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return saved, out


def calls(case, x, weight, bias, channels):
    if case is None:
        return lambda: linear(x, weight, bias, channels)
    return lambda: conv(x, weight, bias, channels, **case.keywords())


@pytest.mark.parametrize("case", [None, *CASES.values()], ids=["linear", *CASES])
def test_a_frozen_layer_does_not_save_its_input(backend, case):
    if case is None:
        x, weight, bias = (torch.randn(s) for s in ((8, 4), (5, 4), (5,)))
    else:
        x, weight, bias = leaves(case)
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    channels = ActiveChannels(len(bias))
    saved, _ = saved_by(calls(case, x, weight, bias, channels))
    assert sum(t.nbytes for t in saved) == x.nbytes + weight.nbytes
    channels.set([])
    saved, out = saved_by(calls(case, x, weight, bias, channels))
    assert sum(t.nbytes for t in saved) == weight.nbytes
    out.sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert x.grad is not None
    saved, out = saved_by(calls(case, x.detach(), weight, bias, channels))
    assert saved == []
    assert out.grad_fn is None
    assert not out.requires_grad


def test_the_input_is_not_saved_for_the_bias_alone():
    x, weight, bias = torch.randn(8, 4), torch.randn(5, 4), torch.randn(5, requires_grad=True)
    saved, out = saved_by(lambda: linear(x, weight, bias, oracle.channels_with(oracle.half(5))))
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    out.sum().backward()
    assert torch.equal(bias.grad, torch.tensor([8.0, 0.0, 8.0, 0.0, 8.0]))


def test_backprop_stops_where_nothing_below_learns(monkeypatch):
    """Three linears; freezing the lowest ones ends backprop above them."""
    check, computed = eager.check_unchanged, []

    def counted(channels, generation):
        computed.append(channels)
        check(channels, generation)

    monkeypatch.setattr(eager, "check_unchanged", counted)
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    channels = [oracle.channels_with(oracle.half(4)) for _ in range(3)]

    def step():
        h = torch.randn(2, 4)
        for weight, chosen in zip(weights, channels, strict=True):
            h = linear(h, weight, None, chosen)
        computed.clear()
        h.sum().backward()
        learned = [weight.grad is not None for weight in weights]
        for weight in weights:
            weight.grad = None
        return len(computed), learned

    assert step() == (3, [True, True, True])
    channels[0].set([])
    assert step() == (2, [False, True, True])
    channels[1].set([])
    assert step() == (1, [False, False, True])
    channels[0].set([1])
    assert step() == (3, [True, False, True])


# --- the dense path ------------------------------------------------------------------------------


def test_the_plain_path_builds_no_graph_of_ours():
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    channels = oracle.channels_with(oracle.half(5))
    with torch.no_grad():
        assert linear(x, weight.requires_grad_(), bias, channels).grad_fn is None
    out = linear(x.requires_grad_(), weight.detach(), bias, channels)
    assert "Addmm" in type(out.grad_fn).__name__
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias, channels), F.linear(x, weight, bias))


def test_functorch_transforms_take_frozen_channels_for_constants():
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    channels = oracle.channels_with(oracle.half(5))

    def loss(function, weight, bias, x):
        return function(x, weight, bias).square().sum()

    def ours(x, weight, bias):
        return linear(x, weight, bias, channels)

    def dense(x, weight, bias):
        is_active = channels.mask
        weight = torch.where(is_active[:, None], weight, weight.detach())
        return F.linear(x, weight, torch.where(is_active, bias, bias.detach()))

    weight.requires_grad_()
    for transform in (
        lambda f: torch.func.grad(lambda w: loss(f, w, bias, x))(weight),
        lambda f: torch.vmap(lambda row: loss(f, weight, bias, row))(x),
        lambda f: torch.vmap(torch.func.grad(lambda w, row: loss(f, w, bias, row)), (None, 0))(
            weight, x
        ),
        lambda f: torch.func.jvp(lambda w: loss(f, w, bias, x), (weight,), (weight,))[1],
        lambda f: torch.func.jacrev(lambda w: f(x, w, bias))(weight),
        lambda f: torch.func.hessian(lambda b: loss(f, weight, b, x))(bias),
    ):
        assert torch.equal(transform(ours), transform(dense))
    image, kernel = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    some = oracle.channels_with(oracle.half(4))
    gradient = torch.func.grad(lambda w: conv(image, w, None, some).square().sum())(kernel)
    expected = torch.func.grad(lambda w: F.conv2d(image, w).square().sum())(kernel)
    assert torch.equal(gradient, expected.index_fill(0, some.frozen, 0))
    scale = torch.ones(4, requires_grad=True)
    gradient = torch.func.grad(lambda s: affine(s, None, some)[0].square().sum())(scale)
    assert gradient.tolist() == [2, 0, 2, 0]


# --- masks and time ------------------------------------------------------------------------------


def scaled(channels):
    weight = torch.ones(4, requires_grad=True)
    out = affine(weight, None, channels)[0] * torch.arange(4.0)
    return watched(out, channels) if all_active(channels, weight) else out


@pytest.mark.parametrize(
    "forward",
    [
        lambda c: linear(torch.randn(2, 3), torch.randn(4, 3, requires_grad=True), None, c),
        lambda c: conv(torch.randn(2, 3, 5), torch.randn(4, 3, 2, requires_grad=True), None, c),
        lambda c: linear(
            torch.randn(2, 2, 3), torch.randn(4, 3, requires_grad=True), torch.zeros(4), c
        ).relu_(),
        scaled,
    ],
    ids=["linear", "conv", "linear 3d in place", "affine"],
)
class TestGeneration:
    @pytest.mark.parametrize("before", [[True] * 4, [True, False, False, True]])
    def test_a_change_between_forward_and_backward_raises(self, forward, before):
        channels = oracle.channels_with(before)
        generation = channels.generation
        out = forward(channels)
        channels.set([0, 2])
        message = rf"changed between its forward and its backward.*{generation}.*{generation + 1}"
        if forward is scaled and not all(before):  # autograd notices it
            message = "modified by an inplace operation.*Bool"
        with pytest.raises(RuntimeError, match=message):
            out.sum().backward()

    def test_there_and_back_is_a_change_too(self, forward):
        channels = ActiveChannels(4)
        out = forward(channels)
        channels.set([0, 2])
        channels.reset()
        with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
            out.sum().backward()

    def test_setting_an_equal_mask_is_no_change(self, forward):
        channels = oracle.channels_with([True, False, True, False])
        out = forward(channels)
        channels.set([2, 0])
        out.sum().backward()

    def test_a_change_after_the_last_backward_is_fine(self, forward):
        channels = ActiveChannels(4)
        out = forward(channels)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        channels.set([0])
        forward(channels).sum().backward()


TWICE = pytest.mark.parametrize(
    "forward",
    [
        lambda x, w, c: linear(x, w.flatten(1), None, c),
        lambda x, w, c: conv(x[..., None], w, None, c),
        lambda x, w, c: x * affine(w[:, 0, 0], None, c)[0],
    ],
    ids=["linear", "conv", "affine"],
)


@TWICE
def test_double_backward_with_everything_active_is_torchs(forward):
    x = torch.randn(2, 4, dtype=torch.float64)
    weight = torch.randn(4, 4, 1, dtype=torch.float64, requires_grad=True)

    def loss(w):
        return forward(x, w, ActiveChannels(4)).pow(3).sum()

    assert torch.autograd.gradgradcheck(loss, (weight,))


def test_a_saved_input_that_was_written_over_is_noticed():
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    out = linear(x, weight, None, oracle.channels_with(oracle.half(4)))
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- bad input -----------------------------------------------------------------------------------


def parameter(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("active", [4, 2, 0])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda c: linear(torch.ones(2, 3).long(), parameter(4, 3), None, c),
            TypeError,
            r"input: expected a floating-point tensor, got torch\.int64",
        ),
        (
            lambda c: conv(torch.ones(2, 3, 5).int(), parameter(4, 3, 2), None, c),
            TypeError,
            r"input: expected a floating-point tensor, got torch\.int32",
        ),
        (
            lambda c: linear(torch.ones(2, 3), parameter(4, 3, dtype=torch.float64), None, c),
            TypeError,
            r"weight: expected the input's dtype torch\.float32, got torch\.float64",
        ),
        (
            lambda c: linear(torch.ones(2, 3), parameter(4, 3), torch.ones(4).half(), c),
            TypeError,
            r"bias: expected the input's dtype torch\.float32, got torch\.float16",
        ),
        (
            lambda c: conv(torch.ones(2, 3, 5).bfloat16(), parameter(4, 3, 2), None, c),
            TypeError,
            r"weight: expected the input's dtype torch\.bfloat16, got torch\.float32",
        ),
        (
            lambda c: linear(torch.ones(2, 3), parameter(5, 3), None, c),
            ValueError,
            r"channels: expected 5 channels, got 4",
        ),
        (
            lambda c: conv(torch.ones(2, 3, 5), parameter(6, 3, 2), None, c),
            ValueError,
            r"channels: expected 6 channels, got 4",
        ),
        (
            lambda c: conv(
                torch.ones(2, 4, 5), parameter(4, 3, 2), None, c, transposed=True, groups=2
            ),
            ValueError,
            r"channels: expected 6 channels, got 4",
        ),
        (
            lambda c: linear(torch.ones(2, 3), parameter(4, 3), None, c, grad_input="some"),
            ValueError,
            r"grad_input: expected 'exact' or 'active', got 'some'",
        ),
        (
            lambda c: conv(torch.ones(2, 3, 5), parameter(4, 3), None, c),
            ValueError,
            r"weight: expected 3 to 5 dimensions, got shape \(4, 3\)",
        ),
        (
            lambda c: affine(parameter(5), None, c)[0],
            ValueError,
            r"channels: expected 5 channels, got 4",
        ),
        (
            lambda c: affine(parameter(4), parameter(5), c)[1],
            ValueError,
            r"channels: expected 5 channels, got 4",
        ),
    ],
)
def test_bad_input_raises_whatever_is_active(call, error, message, active):
    """The message names the argument, what was expected and what came."""
    channels = oracle.channels_with([i < active for i in range(4)])
    with pytest.raises(error, match=message):
        call(channels)


@pytest.mark.parametrize("active", [4, 2, 0])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "most"},
        {"padding": "same", "stride": 2},
        {"padding": "same", "transposed": True},
    ],
)
def test_paddings_that_do_not_exist_raise(options, active):
    channels = oracle.channels_with([i < active for i in range(4)])
    weight = parameter(3, 4, 2) if options.get("transposed") else parameter(4, 3, 2)
    for x in (torch.ones(2, 3, 5), parameter(2, 3, 5)):
        with pytest.raises((ValueError, RuntimeError, TypeError), match="padding"):
            conv(x, weight, None, channels, **options)


@pytest.mark.parametrize("active", [4, 2, 0])
def test_shapes_that_do_not_fit_raise_as_in_pytorch(active):
    channels = oracle.channels_with([i < active for i in range(4)])
    with pytest.raises(RuntimeError):
        linear(torch.ones(2, 5), parameter(4, 3), None, channels)
    with pytest.raises(RuntimeError):
        conv(torch.ones(2, 5, 6), parameter(4, 3, 2), None, channels)
    with pytest.raises(RuntimeError):
        conv(torch.ones(6), parameter(4, 3, 2), None, channels)


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("case", [None, CASES["plain"], CASES["depthwise"], CASES["transposed"]])
def test_autocast_is_pytorchs(backend, case, inside):
    """Values as PyTorch under autocast; gradients in the parameters' own dtype."""
    if case is None:
        shapes, theirs, k, layout = ((6, 40, 32), (24, 32), (24,)), F.linear, 24, {}
    else:
        case = case.but(in_per_group=case.in_per_group * 4, out_per_group=case.out_per_group * 4)
        shapes = ((4, case.c, 9, 9), case.weight_shape, (case.k,))
        theirs, k, layout = case.forward, case.k, case.layout
    for mask in (oracle.half(k), [True] * k):
        tensors = [torch.randn(s, requires_grad=True) for s in shapes]
        channels = oracle.channels_with(mask)

        def ours(x, weight, bias, channels=channels):
            if case is None:
                return linear(x, weight, bias, channels)
            return conv(x, weight, bias, channels, **case.keywords())

        def gradients(function, dy=None, tensors=tensors):
            with torch.autocast("cpu", torch.bfloat16):
                out = function(*tensors)
                dy = torch.randn_like(out) if dy is None else dy
                if inside:
                    return out, dy, torch.autograd.grad(out, tensors, dy)
            return out, dy, torch.autograd.grad(out, tensors, dy)

        low_out, dy, low = gradients(theirs)
        out, _, grads = gradients(ours, dy)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, low_out)
        exact = oracle.dense(
            theirs, *(t.bfloat16().double() for t in tensors), grad_output=dy.double()
        )
        for i, (grad, low_grad, true) in enumerate(zip(grads, low, exact, strict=True)):
            assert grad.dtype == torch.float32
            where = layout if i == 1 else {}
            if i > 0:
                low_grad = oracle.zero_frozen(low_grad, mask, **where)
                true = oracle.zero_frozen(true, mask, **where)
                oracle.assert_frozen_are_zero(grad, mask, **where)
            oracle.assert_within_dtype_rule(grad.bfloat16(), low_grad.bfloat16(), true)


def test_autocast_leaves_float64_alone():
    x, weight = torch.randn(2, 3).double(), torch.randn(4, 3).double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, None, oracle.channels_with(oracle.half(4)))
        assert out.dtype == F.linear(x, weight).dtype
    out.sum().backward()
    assert weight.grad.dtype == torch.float64


# --- affine --------------------------------------------------------------------------------------


def test_affine_masks_both_gradients():
    weight, bias = parameter(4), parameter(4)
    scale, shift = affine(weight, bias, oracle.channels_with(oracle.half(4)))
    (scale * torch.tensor([1.0, torch.nan, 3.0, torch.inf]) + shift).sum().backward()
    assert weight.grad.tolist() == [1, 0, 3, 0]
    assert bias.grad.tolist() == [1, 0, 1, 0]


def test_affine_saves_the_mask_alone_and_stops():
    weight, bias = parameter(4), parameter(4)
    channels = oracle.channels_with(oracle.half(4))
    saved, _ = saved_by(lambda: affine(weight, bias, channels))
    assert {t.data_ptr() for t in saved} == {channels.mask_on().data_ptr()}
    scale, shift = affine(weight, bias, oracle.channels_with([False] * 4))
    assert not scale.requires_grad
    assert not shift.requires_grad


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_affine_with_one_parameter_that_learns(needs):
    weight, bias = (torch.ones(4).requires_grad_(n) for n in needs)
    scale, shift = affine(weight, bias, oracle.channels_with(oracle.half(4)))
    (scale + shift).sum().backward()
    for tensor, needed in zip((weight, bias), needs, strict=True):
        assert tensor.grad.tolist() == [1, 0, 1, 0] if needed else tensor.grad is None


def test_affine_without_parameters():
    assert affine(None, None, ActiveChannels(3)) == (None, None)
