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

HALVES = (torch.bfloat16, torch.float16)

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


def gradients_in_float(x, weight, dy, window, channels):
    """As under autocast."""
    geometry = ConvGeometry(*window[1:], False, (0, 0), 1)
    call = cpu.conv_call(
        weight,
        x.shape,
        geometry,
        channels.on(x.device),
        KernelChoice(Strategy.CUSTOM),
        in_float=True,
    )
    return call(dy, x, weight, (False, True, True))[1:]


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
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_width_of_channels_and_every_window(c, window, last, dtype):
    x, weight, dy = operands(c, 13, (9, 8), window, dtype, last)
    geometry = ConvGeometry(*window[1:], False, (0, 0), 1)
    _, exact, exact_bias = geometry.backward(
        dy.double(), x.double(), weight.double(), (False, True, True)
    )
    few = ([4], [0, 12], [1, 5, 6], [2, 3, 4, 5], [0, 1, 4, 9, 12])
    for active in (*few, [0, 2, 4, 6, 8, 10, 12], range(2, 10), range(13)):
        channels = ActiveChannels(13)
        channels.set(list(active))
        expected, expected_bias = torch.zeros_like(exact), torch.zeros_like(exact_bias)
        expected[list(active)] = exact[list(active)]
        expected_bias[list(active)] = exact_bias[list(active)]
        for compute in (gradients, gradients_in_float):
            rows, bias = compute(x, weight, dy, window, channels)
            assert rows.dtype == bias.dtype == (dtype if compute is gradients else torch.float32)
            assert torch.equal(rows, expected.to(rows.dtype))
            assert torch.equal(bias, expected_bias.to(rows.dtype))
            assert rows.stride() == weight.stride()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (7, 7), (40, 41)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("window", ["1x1", "3x3", "3x3 strided"])
@pytest.mark.parametrize("c", [3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_images_of_any_size(size, last, window, c, dtype):
    x, weight, dy = operands(c, 6, size, WINDOWS[window], dtype, last, batch=11)
    channels = ActiveChannels(6)
    channels.set([1, 4])
    singles = (t.double() for t in (x, weight, dy))
    dense, dense_bias = gradients(*singles, WINDOWS[window], channels, Strategy.DENSE)
    for count in (1, 2):
        with threads(count):
            rows, bias = gradients(x, weight, dy, WINDOWS[window], channels)
        assert torch.equal(rows, dense.to(dtype))
        assert torch.equal(bias, dense_bias.to(dtype))


# Few sums and many pixels are added up in parts; many channels are taken in groups, whose rows are
# written where they belong.
@pytest.mark.parametrize(
    ("rows", "c", "k"),
    [(1, 8, 3), (40, 24, 400), (700, 130, 250), (5000, 9, 20), (300, 72, 90), (60, 1100, 12)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
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
            assert torch.equal(grad, expected.to(dtype))
            expected = dy.double().sum(0).index_fill(0, order[n:], 0)
            assert torch.equal(bias, expected.to(dtype))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_call_finds_nothing_of_the_one_before(last, dtype):
    """Scratch memory is not cleared between calls."""
    window = WINDOWS["wide padding"]
    for c, k, size in ((70, 40, (20, 21)), (9, 5, (2, 2)), (3, 13, (4, 1))):
        x, weight, dy = operands(c, k, size, window, dtype, last)
        channels = ActiveChannels(k)
        channels.set(range(0, k, 2))
        for poison in (float("nan"), 1.0):
            gradients(x * poison, weight, dy, window, channels)
        rows, bias = gradients(x, weight, dy, window, channels)
        singles = (t.float() for t in (x, weight, dy))
        dense, dense_bias = gradients(*singles, window, channels, Strategy.DENSE)
        assert torch.equal(rows, dense.to(dtype))
        assert torch.equal(bias, dense_bias.to(dtype))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("c", [3, 20])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_of_half_types_goes_where_that_of_float32_goes(c, window, last, dtype):
    """By some taps it is read, or by none."""
    channels = ActiveChannels(6)
    channels.set([1, 4, 5])
    for row, column in ((0, 0), (3, 0), (0, 7), (4, 7), (8, 7), (4, 4)):
        for poisoned in "x", "dy":
            x, weight, dy = operands(c, 6, (9, 8), window, dtype, last)
            t = x if poisoned == "x" else dy
            t[1, 1, min(row, t.shape[2] - 1), min(column, t.shape[3] - 1)] = torch.nan
            rows, bias = gradients(x, weight, dy, window, channels)
            singles = gradients(x.float(), weight.float(), dy.float(), window, channels)
            assert singles[1].isnan().any() == (poisoned == "dy")
            for half, single in zip((rows, bias), singles, strict=True):
                assert torch.equal(half.nan_to_num(1e4), single.to(dtype).nan_to_num(1e4))


def test_no_images():
    x, weight, dy = operands(8, 4, (5, 5), WINDOWS["3x3"], batch=0)
    channels = ActiveChannels(4)
    channels.set([2])
    rows, bias = gradients(x, weight, dy, WINDOWS["3x3"], channels)
    assert not rows.any()
    assert not bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    x, weight, dy = operands(40, 24, (31, 33), WINDOWS["3x3"], dtype)
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


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_are_summed_in_float32(dtype, last):
    """As exactly as the products of float32 operands are, and rounded once."""
    window = WINDOWS["3x3"]
    x, weight, dy = operands(20, 6, (31, 33), window, dtype, last, batch=9)
    x, dy = (torch.randn_like(t) for t in (x, dy))
    channels = ActiveChannels(6)
    channels.set([0, 2, 5])
    rows, bias = gradients_in_float(x, weight, dy, window, channels)
    doubles = (t.double() for t in (x, weight, dy))
    exact, exact_bias = gradients(*doubles, window, channels, Strategy.DENSE)
    assert (rows - exact).abs().max() < 2e-6 * exact.abs().max()
    assert (bias - exact_bias).abs().max() < 2e-6 * exact_bias.abs().max()
    rounded = gradients(x, weight, dy, window, channels)
    assert torch.equal(rounded[0], rows.to(dtype))
    assert torch.equal(rounded[1], bias.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
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


def test_every_number_of_float16_is_read_as_what_it_is():
    """Subnormal ones, infinities and NaN too."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x, dy = numbers.view(1, -1, 1, 1), numbers.new_zeros(1, 2, 1, 1)
    dy[0, 1] = 1
    channels = ActiveChannels(2)
    channels.set([1])
    weight = numbers.new_zeros(2, len(numbers), 1, 1)
    rows, _ = gradients_in_float(x, weight, dy, WINDOWS["1x1"], channels)
    assert torch.equal(rows[1].flatten().isnan(), numbers.isnan())
    assert torch.equal(rows[1].flatten().nan_to_num(7), numbers.float().nan_to_num(7))


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
