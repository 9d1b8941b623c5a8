"""Products for linear layers and convolutions, thread by thread, against float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.problem import ConvGeometry
from tests.cuda_on_cpu.emulator import MODES, EmulationError, Run
from tests.support.cuda_cases import DTYPES, SMALLEST, images, library, pointer, poisoned, wgrad
from tests.support.gpu_cases import MASKS, assert_gradient, channels

TILES = {"few": 1, "wide": 20, "packed": 1}


def matrices(t, k, c, dtype):
    generator = torch.Generator().manual_seed(t + k + c)
    return torch.randn(t, k, generator=generator).to(dtype), torch.randn(
        t, c, generator=generator
    ).to(dtype)


def check_linear(t, k, c, dtype, mask, **how):
    dy, x = matrices(t, k, c, dtype)
    chosen = channels(k, mask)
    grad, bias, launches = wgrad(chosen, dy, x, **how)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)
    return launches


def check_conv(size, k, kernel, geometry, dtype, mask, **how):
    c = size[1]
    x = images(*size, dtype=dtype)
    weight = torch.zeros(k, c, *kernel, dtype=torch.float64)
    shape = torch.nn.functional.conv2d(
        x.double(), weight, None, geometry.stride, geometry.padding, geometry.dilation
    ).shape
    dy = images(*shape, dtype=dtype, seed=1)
    chosen = channels(k, mask)
    grad, bias, launches = wgrad(chosen, dy, x, geometry, kernel, **how)
    _, exact, exact_bias = geometry.backward(dy.double(), x.double(), weight, (False, True, True))
    assert_gradient(grad, exact, chosen, dy.numel() // k)
    assert_gradient(bias, exact_bias, chosen, dy.numel() // k)
    return launches


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("k", [16, 64, 104])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_with_every_dtype_and_mask(dtype, mask, k, packed):
    if channels(k, mask).n_active > 32:
        packed = True
    check_linear(70, k, 72, dtype, mask, parts=2, packed=packed)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("k", [16, 64])
def test_linear_whatever_runs_first(k, packed, mode):
    check_linear(100, k, 136, torch.float16, "random", parts=3, packed=packed, mode=mode)
    check_linear(100, k, 40, torch.float32, "random", parts=2, packed=packed, mode=mode)


@pytest.mark.parametrize(
    ("t", "k", "c"), [(1, 8, 8), (16, 8, 64), (17, 24, 520), (257, 16, 16), (33, 136, 264)]
)
def test_ragged_shapes(t, k, c):
    for dtype in (torch.float16, torch.float32):
        check_linear(t, k, c, dtype, "one", parts=2)
        check_linear(t, k, c, dtype, "random", parts=2, packed=True)


def test_fewer_active_than_provided_for():
    for packed in (False, True):
        for mask in ("one", "none", "random"):
            check_linear(50, 32, 24, torch.float16, mask, most=32, packed=packed)


def test_nan_of_a_frozen_feature_reaches_nothing():
    dy, x = matrices(40, 32, 24, torch.float16)
    chosen, exact = channels(32, "random"), dy.double().t() @ x.double()
    poisoned = dy.clone()
    poisoned[:, chosen.frozen] = torch.nan
    for packed in (False, True):
        grad, bias, _ = wgrad(chosen, poisoned, x, packed=packed)
        assert_gradient(grad, exact, chosen, 40)
        assert_gradient(bias, dy.double().sum(0), chosen, 40)


CONVS: dict = {
    "plain": ((2, 8, 7, 6), (3, 3), ((1, 1), (1, 1), (1, 1))),
    "strided": ((2, 16, 9, 8), (3, 3), ((2, 2), (1, 1), (1, 1))),
    "pointwise": ((3, 8, 5, 5), (1, 1), ((1, 1), (0, 0), (1, 1))),
    "dilated": ((1, 8, 9, 11), (3, 2), ((1, 2), (2, 1), (2, 3))),
    "small images": ((40, 8, 2, 1), (3, 3), ((1, 1), (1, 1), (1, 1))),
}


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype, name, packed):
    size, kernel, (stride, padding, dilation) = CONVS[name]
    geometry = ConvGeometry(stride, padding, dilation, False, (0, 0), 1)
    for mask in ("one", "random", "all"):
        check_conv(size, 24, kernel, geometry, dtype, mask, parts=2, packed=packed)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_both_layouts_of_the_weight(channels_last, mask):
    size, kernel, (stride, padding, dilation) = CONVS["plain"]
    geometry = ConvGeometry(stride, padding, dilation, False, (0, 0), 1)
    how = {"parts": 3, "channels_last": channels_last}
    check_conv(size, 16, kernel, geometry, torch.bfloat16, mask, **how)


def test_bits_do_not_depend_on_the_order_of_threads():
    dy, x = matrices(200, 32, 48, torch.bfloat16)
    first, *others = [
        wgrad(channels(32, "random"), dy, x, parts=3, mode=mode)[:2] for mode in MODES
    ]
    for grad, bias in others:
        assert torch.equal(grad, first[0])
        assert torch.equal(bias, first[1])


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
def test_few_rows_are_read_and_written_once(packed):
    """Within 1.15 of X, of the sectors of dY that hold an active neuron, and of the gradient."""
    t, k, c = 4096, 256, (512 if not packed else 1024)
    dy, x = matrices(t, k, c, torch.float16)
    chosen = channels(k, "one")
    chosen.set([3, 40, 41, 90, 133, 200, 201, 250])
    grad, _, launches = wgrad(chosen, dy, x, parts=8, packed=packed)
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    sectors = len({i // 16 for i in chosen.active.tolist()})
    least = 2 * x.numel() + sectors * 32 * t + 2 * grad.numel()
    moved = sum(launch.total.moved_bytes for launch in launches)
    assert least <= moved <= 1.15 * least


# Images, and the padding: 8 or 16 pixels wide are the rectangles.
FEW_ROWS = {
    "plain": ((2, 8, 7, 6), (1, 1)),
    "no padding": ((1, 72, 9, 17), (0, 0)),
    "wide padding": ((1, 136, 5, 3), (2, 1)),
    "padding beside": ((2, 16, 3, 30), (1, 2)),
    "two lines": ((2, 8, 2, 14), (2, 0)),
    "one line": ((3, 8, 1, 40), (1, 1)),
    "one column": ((2, 8, 11, 1), (1, 1)),
    "one pixel": ((3, 264, 1, 1), (1, 1)),
}


def few_rows_conv(
    chosen, dy, x, padding, *, parts=1, most=16, packed=False, mode=MODES[0], kernels=None
):
    """As ``wgrad``, of a 3 x 3 convolution of channels_last images in one pass."""
    dtype, (n, c, height, width) = DTYPES[x.dtype], x.shape
    k, t = len(chosen), dy.numel() // len(chosen)
    order, count = chosen.order(), chosen.count("cpu")
    slots = 8 if most <= 8 else 16
    names = {
        "parts": poisoned(parts, most, 9, c),
        "bias_parts": poisoned(parts, most),
        "packed": poisoned(t, slots, dtype=x.dtype),
        "grad": poisoned(k, 9 * c, dtype=x.dtype),
        "bias": poisoned(k, dtype=x.dtype),
    }
    reads = {"dy": dy, "x": x, "order": order, "count": count}
    run = Run(kernels or library(), mode, reads, names, SMALLEST)
    launches = []
    source, stride, channels_of = dy, k, order
    if packed:
        launches += run.call(
            *("neq_cuda_pack", dtype, dy, k, order, count, names["packed"], slots, None),
            *(3, t, most, 0, None),
        )
        source, stride, channels_of = names["packed"], slots, None
    x_strides = torch.tensor([x.stride(i) for i in (0, 2, 3)])
    sizes = torch.tensor([height, width, *dy.shape[2:], *padding], dtype=torch.int32)
    launches += run.call(
        *("neq_cuda_few_rows_conv", dtype, source, stride, x, pointer(x_strides)),
        *(pointer(sizes), channels_of, count, names["parts"], names["bias_parts"]),
        *(parts, c, n, most, None),
    )
    launches += run.call(
        *("neq_cuda_finish", 0, dtype, names["parts"], names["bias_parts"], order, count),
        *(names["grad"], names["bias"], k, c, 1, c, parts, parts, most, 9, None),
    )
    return names["grad"].view(k, 3, 3, c).permute(0, 3, 1, 2), names["bias"], launches


def check_few_rows(size, k, padding, dtype, chosen, poison=False, **how):
    geometry = ConvGeometry((1, 1), padding, (1, 1), False, (0, 0), 1)
    n, c, height, width = size
    x = images(*size, dtype=dtype)
    out = (height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    dy = images(n, k, *out, dtype=dtype, seed=1)
    weight = torch.zeros(k, c, 3, 3, dtype=torch.float64)
    _, exact, exact_bias = geometry.backward(dy.double(), x.double(), weight, (False, True, True))
    if poison:
        dy[:, chosen.frozen] = torch.nan
    grad, bias, launches = few_rows_conv(chosen, dy, x, padding, **how)
    assert_gradient(grad, exact, chosen, dy.numel() // k)
    assert_gradient(bias, exact_bias, chosen, dy.numel() // k)
    return dy, x, launches


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", FEW_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_of_a_convolution(dtype, name, mask):
    size, padding = FEW_ROWS[name]
    for k in (8, 16):
        check_few_rows(size, k, padding, dtype, channels(k, mask), parts=2, most=k)


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_few_rows_of_a_convolution_whatever_runs_first(mode, packed):
    how = {"parts": 3, "packed": packed, "mode": mode}
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((3, 24, 10, 9), (2, 136, 7, 16)):
            check_few_rows(size, 40, (1, 1), dtype, few(40), **how)


@pytest.mark.parametrize("c", [40, 128, 192])
@pytest.mark.parametrize("width", [11, 31])
def test_stripes_begin_anywhere_in_a_part(width, c):
    """In 3 images of 2 stripes: some parts begin, and some end, in the middle of a stripe."""
    for parts in (1, 5, 8, 36):
        for most in (8, 16):
            check_few_rows(
                (3, c, 12, width), 24, (1, 1), torch.float16, few(24), parts=parts, most=most
            )


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("n", range(1, 17))
def test_few_rows_side_by_side_and_far_apart(n, packed):
    for k, step in ((24, 1), (16 * n, 16)):
        chosen = channels(k, "none")
        chosen.set([step - 1 + i * step for i in range(n)])
        check_few_rows(
            (2, 24, 6, 15), k, (1, 1), torch.bfloat16, chosen, poison=True, parts=3, packed=packed
        )


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_with_nan_in_frozen_channels(dtype, packed):
    for padding in ((0, 0), (1, 1), (2, 2)):
        for most in (4, 16):
            check_few_rows(
                (2, 24, 5, 17), 32, padding, dtype, few(32), poison=True, most=most, packed=packed
            )


def test_bits_of_few_rows_do_not_depend_on_the_order_of_threads():
    x, dy = (images(3, 72, 9, 14, dtype=torch.bfloat16, seed=i)[:, : 72 - 40 * i] for i in (0, 1))
    dy = dy.contiguous(memory_format=torch.channels_last)
    first, *others = [few_rows_conv(few(32), dy, x, (1, 1), parts=3, mode=m)[:2] for m in MODES]
    for grad, bias in others:
        assert torch.equal(grad, first[0])
        assert torch.equal(bias, first[1])


@pytest.mark.parametrize(("most", "padding"), [(17, (1, 1)), (8, (3, 1)), (8, (1, 3))])
def test_what_one_pass_cannot_do_is_refused(most, padding):
    with pytest.raises(EmulationError, match="invalid argument"):
        check_few_rows((1, 8, 4, 4), 24, padding, torch.float16, few(24), most=most)


def few(k):
    chosen = channels(k, "one")
    chosen.set([1, 2, k // 2, k - 1])
    return chosen


@pytest.mark.parametrize("width", [28, 56])
def test_few_rows_of_a_convolution_read_and_write_once(width):
    chosen, k = few(128), 128
    dy, x, launches = check_few_rows(
        (6, 256, 28, width), k, (1, 1), torch.float16, chosen, parts=4, most=4
    )
    sectors = len({i // 16 for i in chosen.active.tolist()})
    least = 2 * x.numel() + sectors * 32 * dy.numel() // k + 2 * k * 9 * 256
    moved = sum(launch.total.moved_bytes for launch in launches)
    assert least <= moved <= 1.15 * least, moved / least


@pytest.mark.parametrize(("k", "c", "taps"), [(300, 4, 1), (9, 20, 9), (130, 1024, 1), (3, 680, 3)])
def test_the_second_pass_reads_what_is_active_once_for_a_block(k, c, taps):
    """Rows that are shorter and longer than a block's, and blocks that begin anywhere in one."""
    chosen = channels(k, "random")
    order, count = chosen.order(), chosen.count("cpu")
    parts = torch.randn(2, k, taps * c)
    names = {"grad": poisoned(k, taps * c, dtype=torch.bfloat16)}
    reads = {"parts": parts, "order": order, "count": count}
    (launch,) = Run(library(("finish",)), MODES[0], reads, names, SMALLEST).call(
        *("neq_cuda_finish", 0, 2, parts, None, order, count, names["grad"], None),
        *(k, taps * c, 1, taps * c, 2, 0, k, 1, None),
    )
    n = chosen.n_active
    exact = torch.zeros(k, taps * c, dtype=torch.float64)
    exact[order[:n]] = parts[:, :n].double().sum(0)
    assert torch.equal(names["grad"], exact.float().bfloat16())
    blocks = -(-k * taps * c // 4 // 256)
    indices = sum(launch.regions[name].moved_bytes for name in ("order", "count"))
    assert indices <= blocks * 96 + 16 * k
