"""The weight gradients of convolutions, dense, grouped and depthwise, against float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends.triton.conv_wgrad import conv_wgrad
from neq_kernels.backends.triton.depthwise_wgrad import depthwise_wgrad
from neq_kernels.backends.triton.tiles import Tiles
from tests.support import oracle
from tests.support.gpu_cases import DTYPES, EXECUTOR, MASKS, assert_gradient, channels
from tests.support.wgrad_operands import LAYOUTS, conv_operands, geometry

SMALL = Tiles(16, 16, 16, 4, 2)


def check(kernel, problem, g, mask, dtype, layout, device, **options):
    images, c, k, size, taps = problem
    dy, x, weight = conv_operands(images, c, k, size, taps, g, dtype, layout)
    chosen = channels(k, mask)
    exact = g.backward(dy.double(), x.double(), weight.double(), (False, True, True))
    grad, bias = kernel(
        dy.to(device),
        x.to(device),
        weight.to(device),
        g,
        chosen.order(device),
        chosen.count(device),
        chosen.n_active,
        True,
        **options,
    )
    reduction = dy.numel() // k
    assert grad.stride() == weight.stride()
    assert_gradient(grad, exact[1], chosen, reduction)
    assert_gradient(bias, exact[2], chosen, reduction)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_mask_and_layout(dtype, mask, layout, splits, device):
    problem = (2, 5, 18, (5, 6), (3, 2))
    g = geometry(padding=(1, 0))
    check(conv_wgrad, problem, g, mask, dtype, layout, device, splits=splits, tiles=SMALL)


GEOMETRIES = {
    "pointwise": ((2, 7, 9, (4, 4), (1, 1)), geometry()),
    "stride": ((1, 4, 6, (7, 8), (3, 3)), geometry(stride=(2, 3), padding=(1, 1))),
    "dilation": ((1, 3, 5, (9, 8), (3, 2)), geometry(dilation=(2, 3), padding=(2, 1))),
    "one pixel": ((3, 4, 6, (3, 3), (3, 3)), geometry()),
    "groups": ((2, 6, 9, (5, 4), (3, 3)), geometry(padding=(1, 1), groups=3)),
    "depthwise as groups": ((2, 4, 8, (4, 4), (3, 3)), geometry(padding=(1, 1), groups=4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(name, layout, device):
    problem, g = GEOMETRIES[name]
    check(conv_wgrad, problem, g, "random", torch.float32, layout, device, splits=2, tiles=SMALL)
    check(conv_wgrad, problem, g, "one", torch.float32, layout, device, splits=1, tiles=SMALL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_every_dtype_mask_and_layout(dtype, mask, layout, device):
    g = geometry(padding=(1, 1), groups=20)
    check(depthwise_wgrad, (2, 20, 20, (5, 6), (3, 3)), g, mask, dtype, layout, device, splits=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_geometries(layout, device):
    g = geometry(stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=4)
    check(depthwise_wgrad, (2, 4, 12, (9, 7), (5, 2)), g, "random", torch.float32, layout, device)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_is_rounded_only_where_pytorch_allows_it(precision, device):
    """A tensor core rounds float32 operands to ten bits of fraction; the interpreter does not."""
    torch.backends.cudnn.conv.fp32_precision = precision
    g = geometry()
    dy, x, weight = conv_operands(2, 5, 18, (5, 6), (1, 1), g, torch.float32, "nchw")
    chosen = channels(18, "all")
    exact = g.backward(dy.double(), x.double(), weight.double(), (False, True, False))[1]
    tensors = (t.to(device) for t in (dy, x, weight))
    grad, _ = conv_wgrad(
        *tensors, g, chosen.order(device), chosen.count(device), 18, False, tiles=SMALL
    )
    error = oracle.largest(grad.cpu() - exact) / oracle.largest(exact)
    rounds = precision == "tf32" and EXECUTOR != "interpreter"
    assert 1e-5 < error < 1e-2 if rounds else error < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [conv_wgrad, depthwise_wgrad])
def test_offsets_of_64_bits(kernel, layout, device, monkeypatch):
    """What images of more than 2**31 elements take, on small ones."""
    monkeypatch.setitem(kernel.__globals__, "is_wide", lambda *_: True)
    g = geometry(padding=(1, 1), stride=(2, 1), groups=6 if kernel is depthwise_wgrad else 1)
    problem = (2, 6, 18, (5, 6), (3, 2))
    check(kernel, problem, g, "random", torch.float32, layout, device, splits=2)
