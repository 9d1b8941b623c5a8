"""The direct wgrad of the extension, against dense autograd in float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Strategy
from neq_kernels.channels import ActiveChannels
from tests.support import oracle
from tests.support.arrange import threads
from tests.support.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="tests of the extension")

# (kernel, stride, padding, dilation)
WINDOWS = {
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 strided": ((1, 1), (2, 3), (0, 0), (1, 1)),
    "1x1 padded": ((1, 1), (1, 1), (1, 1), (1, 1)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 strided": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated": ((3, 2), (1, 1), (2, 1), (2, 3)),
    "wide padding": ((2, 2), (1, 2), (3, 5), (1, 1)),
    "7x7": ((7, 7), (2, 2), (3, 3), (1, 1)),
}


def gradients(x, weight, dy, window, channels, strategy=Strategy.CUSTOM, bias=True):
    geometry = ConvGeometry(*window[1:], False, (0, 0), 1)
    _, rows, entries = cpu.conv_backward(
        dy,
        x,
        weight,
        (False, True, bias),
        input_size=x.shape,
        geometry=geometry,
        active=channels.on(x.device),
        choice=KernelChoice(strategy),
    )
    return rows, entries


def operands(c, k, size, window, dtype=torch.float64, last=False, batch=3):
    kernel, stride, padding, dilation = window
    x = oracle.small_integers((batch, c, *size), dtype)
    weight = oracle.small_integers((k, c, *kernel), dtype)
    out = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)
    dy = oracle.small_integers(tuple(out.shape), dtype)
    if last:
        x, weight, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))
    return x, weight, dy


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("c", [1, 3, 4, 5, 8, 9, 12, 24, 35, 40, 56, 70])
def test_every_width_of_channels_and_every_window(c, window, last):
    x, weight, dy = operands(c, 13, (9, 8), window, torch.float32, last)
    geometry = ConvGeometry(*window[1:], False, (0, 0), 1)
    _, exact, exact_bias = geometry.backward(
        dy.double(), x.double(), weight.double(), (False, True, True)
    )
    few = ([4], [0, 12], [1, 5, 6], [2, 3, 4, 5], [0, 1, 4, 9, 12])
    for active in (*few, [0, 2, 4, 6, 8, 10, 12], range(2, 10), range(13)):
        channels = ActiveChannels(13)
        channels.set(list(active))
        rows, bias = gradients(x, weight, dy, window, channels)
        expected, expected_bias = torch.zeros_like(exact), torch.zeros_like(exact_bias)
        expected[list(active)] = exact[list(active)]
        expected_bias[list(active)] = exact_bias[list(active)]
        assert torch.equal(rows.double(), expected)
        assert torch.equal(bias.double(), expected_bias)
        assert rows.stride() == weight.stride()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (40, 41)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_images_of_any_size(size, last):
    window = WINDOWS["3x3"]
    x, weight, dy = operands(10, 6, size, window, last=last)
    channels = ActiveChannels(6)
    channels.set([1, 4])
    rows, bias = gradients(x, weight, dy, window, channels)
    dense, dense_bias = gradients(x, weight, dy, window, channels, Strategy.DENSE)
    assert torch.equal(rows, dense)
    assert torch.equal(bias, dense_bias)


# Few sums and many pixels are added up in parts; many channels are taken in groups, whose rows are
# written where they belong.
@pytest.mark.parametrize(
    ("rows", "c", "k"),
    [(1, 8, 3), (40, 24, 400), (700, 130, 250), (5000, 9, 20), (300, 72, 90), (60, 1100, 12)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_layers_of_any_size(rows, c, k, dtype):
    x, weight, dy = (oracle.small_integers(s, dtype) for s in ((rows, c), (k, c), (rows, k)))
    for n in sorted({1, min(k, 2), min(k, 7), k // 2, k - 1, k} - {0}):
        channels = ActiveChannels(k)
        channels.set(torch.randperm(k)[:n])
        order = channels.order()
        for count in (1, 2, 3):
            with threads(count):
                _, grad, bias = cpu.linear_backward(
                    dy,
                    x,
                    weight,
                    (False, True, True),
                    input_size=x.shape,
                    active=channels.on(x.device),
                    choice=KernelChoice(Strategy.CUSTOM),
                )
            expected = (dy.t().double() @ x.double()).index_fill(0, order[n:], 0)
            assert torch.equal(grad.double(), expected)
            assert torch.equal(bias.double(), dy.double().sum(0).index_fill(0, order[n:], 0))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_a_call_finds_nothing_of_the_one_before(last):
    """Scratch memory is not cleared between calls."""
    window = WINDOWS["wide padding"]
    for c, k, size in ((70, 40, (20, 21)), (9, 5, (2, 2)), (3, 13, (4, 1))):
        x, weight, dy = operands(c, k, size, window, torch.float32, last)
        channels = ActiveChannels(k)
        channels.set(range(0, k, 2))
        for poison in (float("nan"), 1.0):
            gradients(x * poison, weight, dy, window, channels)
        rows, bias = gradients(x, weight, dy, window, channels)
        dense, dense_bias = gradients(x, weight, dy, window, channels, Strategy.DENSE)
        assert torch.equal(rows, dense)
        assert torch.equal(bias, dense_bias)


def test_no_images():
    x, weight, dy = operands(8, 4, (5, 5), WINDOWS["3x3"], batch=0)
    channels = ActiveChannels(4)
    channels.set([2])
    rows, bias = gradients(x, weight, dy, WINDOWS["3x3"], channels)
    assert not rows.any()
    assert not bias.any()


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, weight, dy = operands(40, 24, (31, 33), WINDOWS["3x3"], torch.float32)
    x, dy = torch.randn_like(x), torch.randn_like(dy)
    channels = ActiveChannels(24)
    channels.set([0, 3, 4, 9, 20])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(gradients(x, weight, dy, WINDOWS["3x3"], channels))
    for rows, bias in results[1:]:
        assert torch.equal(rows, results[0][0])
        assert torch.equal(bias, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_multiplied_in_float32(dtype):
    """Each row is rounded once."""
    x, weight, dy = operands(8, 4, (5, 5), WINDOWS["3x3"], dtype)
    channels = ActiveChannels(4)
    channels.set([0, 2])
    halves = gradients(x, weight, dy, WINDOWS["3x3"], channels)
    singles = gradients(x.float(), weight.float(), dy.float(), WINDOWS["3x3"], channels)
    for half, single in zip(halves, singles, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))


def test_what_it_cannot_serve_is_refused():
    x, weight, dy = operands(8, 4, (5, 5), WINDOWS["3x3"], torch.float32)
    channels = ActiveChannels(4)
    channels.set([2])
    with pytest.raises(ValueError, match="grad_output: expected size 5"):
        gradients(x, weight, dy[:, :, 1:], WINDOWS["3x3"], channels)


@pytest.mark.parametrize("strategy", [Strategy.CUSTOM, Strategy.PACK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [511, 1])
def test_rows_of_any_alignment_in_a_large_gradient_are_cleared(c, dtype, strategy):
    """Large enough for zeros that pass the caches by; the memory they are written to is not new."""
    k = 2**20 // (c * 4) + 5
    active = [0, 3, 4, k // 2, k - 2]
    x, dy = (oracle.small_integers((4, size), dtype) for size in (c, k))
    weight = x.new_zeros(k, c)
    channels = ActiveChannels(k)
    channels.set(active)
    for _ in range(3):  # small blocks of memory are used again, large ones from the second time on
        torch.full_like(weight, torch.nan)
        _, grad, _ = cpu.linear_backward(
            dy,
            x,
            weight,
            (False, True, False),
            input_size=x.shape,
            active=channels.on(x.device),
            choice=KernelChoice(strategy),
        )
    expected = torch.zeros_like(weight)
    expected[active] = (dy.t() @ x)[active]
    assert torch.equal(grad, expected)
